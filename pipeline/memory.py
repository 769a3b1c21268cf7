"""Memory by arithmetic, before anything is bought or started: what each role takes up on a GPU, and on its machine.

In bytes, from the settings and the shape of the model (all models are taken to have the policy's). Weights that are
trained are float32, and so are gradients and AdamW's two moments; ZeRO keeps a copy of its part of the weights for
AdamW. Of what ZeRO-3 divides a layer is gathered where it computes, and the whole policy where our own decoder samples.
Left out: the CUDA context (half a gigabyte), what the allocator loses to fragments, and logits, which exist a few
megabytes at a time. `python -m pipeline.memory CONFIG --shape 70b` prints the table of a configuration.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from components.rl.settings import RLSettings
from components.settings import Compute, Lora, NativeSamplerSettings, Training
from pipeline.settings import Settings

WIDE, NARROW = 4, 2
"""Bytes of a float32 and of a bfloat16."""
BUCKETS = 3 * 4 * (1 << 25)
"""Of numbers on their way between processes."""


class Shape(NamedTuple):
    """The sizes of a Llama-like model."""

    hidden: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def kv_width(self) -> int:
        """Numbers of a token's keys in a layer, and of its values."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of a block's linear layers."""
        h, kv, inner = self.hidden, self.kv_width, self.inner
        return (h, h), (h, kv), (h, kv), (h, h), (h, inner), (h, inner), (inner, h)

    @property
    def block(self) -> int:
        """Weights of a block."""
        return sum(inputs * outputs for inputs, outputs in self.linears) + 2 * self.hidden

    def parameters(self) -> int:
        """Weights, the embeddings and an output layer of their own among them."""
        return self.layers * self.block + self.hidden + 2 * self.vocab * self.hidden

    def gathered(self, embeddings: int = 0) -> int:
        """Weights that a pass has in full where they are divided: a block's, and throughout the output layer's.

        Embeddings that are trained stay until the backward pass is over.
        """
        return self.block + (1 + embeddings) * self.vocab * self.hidden

    def adapters(self, rank: int) -> int:
        """Weights of low-rank adapters on every linear layer of the blocks."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.linears)

    def head(self) -> int:
        """Weights of a critic on the policy's hidden states: a hidden layer and a value."""
        return self.hidden * (self.hidden + 1) + self.hidden + 1


SHAPES = {
    "7b": Shape(hidden=4096, layers=32, inner=14336, heads=32, kv_heads=8, vocab=32000),
    "70b": Shape(hidden=8192, layers=80, inner=28672, heads=64, kv_heads=8, vocab=128256),
}
"""Mistral 7B and Llama 3 70B."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by role: all the time, while responses are sampled, and while the weights are updated."""

    always: dict[str, float]
    updating: dict[str, float]
    sampling: dict[str, float] = field(default_factory=dict)
    host: float = 0.0
    """Bytes of the memory of a machine: while models are loaded, or collected where they are saved."""

    @property
    def peak(self) -> float:
        """The most that there is at once."""
        return sum(self.always.values()) + max(sum(self.sampling.values()), sum(self.updating.values()))


class _Network(NamedTuple):
    """Weights that belong together, and how many of them change."""

    held: float
    changed: float


def rl_memory(settings: RLSettings, shape: Shape) -> Memory:
    """The memory of each GPU in the rl step."""
    compute, policy = settings.compute, _policy(settings.lora, shape)
    critics = len(settings.critics)
    size = critics * (shape.head() if settings.share_backbone else shape.parameters())
    generation = settings.generation
    tokens = settings.micro_batch_size * (generation.max_prompt_tokens + generation.max_new_tokens)
    networks = {"policy": policy, "critics": _Network(size, size)}
    backbones = 1 if settings.share_backbone else 1 + critics
    return Memory(
        {name: _kept(compute, network) for name, network in networks.items()} | _frozen(settings, shape),
        _updating(compute, settings.lora, list(networks.values()), backbones, tokens, shape),
        _sampling(settings, policy, shape),
        _host(compute, list(networks.values()), shape),
    )


def training_memory(settings: Training, lora: Lora, shape: Shape) -> Memory:
    """The memory of each GPU in the sft, reward and cost steps."""
    compute, model = settings.compute, _policy(lora, shape)
    updating = _updating(compute, lora, [model], 1, settings.batch_tokens, shape)
    return Memory({"policy": _kept(compute, model)}, updating, host=_host(compute, [model], shape))


def _policy(lora: Lora, shape: Shape) -> _Network:
    adapters = shape.adapters(lora.rank)
    return _Network(shape.parameters() + adapters, adapters or shape.parameters())


def _stage(compute: Compute) -> int:
    return int(compute.strategy.removeprefix("zero").replace("ddp", "0"))


def _part(compute: Compute, number: float, least: int) -> float:
    """What a process has of something that is divided from stage `least` on."""
    return number / (compute.nodes * compute.processes) if _stage(compute) >= least else number


def _kept(compute: Compute, network: _Network) -> float:
    """The weights, AdamW's state and its copy of the weights."""
    weights = _part(compute, WIDE * network.held, 3)
    if compute.offload:
        return weights
    return weights + _part(compute, (3 if _stage(compute) else 2) * WIDE * network.changed, 1)


def _frozen(settings: RLSettings, shape: Shape) -> dict[str, float]:
    """What is only read: whole in every process, but for guests, which are divided with the policy."""
    width, lora = NARROW if settings.frozen_dtype == "bf16" else WIDE, settings.lora.rank > 0
    guest = _part(settings.compute, WIDE * shape.adapters(settings.lora.rank), 3)  # of a rank like the policy's
    model = guest if settings.share_backbone and lora else width * shape.parameters()
    found = {"reference": 0.0 if lora else width * shape.parameters()}
    for name, scorer in (("reward", settings.reward_scorer), ("cost", settings.cost_scorer)):
        if name in settings.teachers:
            found[f"{name} model"] = model if scorer.kind == "model" else 0.0
    return found


def _updating(
    compute: Compute, lora: Lora, networks: Sequence[_Network], backbones: int, tokens: int, shape: Shape
) -> dict[str, float]:
    """What comes and goes with an update whose micro-batches have so many tokens."""
    return {
        "gradients": _part(compute, WIDE * sum(network.changed for network in networks), 2),
        "activations": backbones * _activations(compute, tokens, shape),
        "gathered layer": WIDE * shape.gathered(0 if lora.rank else backbones) if _stage(compute) == 3 else 0.0,
        "weights in bfloat16": _narrow(compute, lora, sum(network.held for network in networks), shape),
        "buckets": BUCKETS,
    }


def _narrow(compute: Compute, lora: Lora, held: float, shape: Shape) -> float:
    """Copies of weights that products are made with: of a layer where one after the other is made, else of all."""
    if compute.dtype == "fp32":
        return 0.0
    one = _stage(compute) == 3 or (compute.gradient_checkpointing and lora.rank > 0)
    return NARROW * (shape.gathered() if one else held)


def _sampling(settings: RLSettings, policy: _Network, shape: Shape) -> dict[str, float]:
    """The decoder's copy of the weights, and its keys and values; a server has its own, elsewhere."""
    divided = _stage(settings.compute) == 3
    if not isinstance(settings.sampler, NativeSamplerSettings):
        return {"gathered layer": WIDE * shape.gathered() if divided else 0.0}
    generation, width = settings.generation, NARROW if settings.compute.dtype == "bf16" else WIDE
    tokens = generation.batch_size * (generation.max_prompt_tokens + generation.max_new_tokens)
    return {
        "gathered policy": WIDE * policy.held if divided else 0.0,
        "decoder's weights": width * shape.parameters(),
        "keys and values": 2.0 * width * tokens * shape.layers * shape.kv_width,
    }


def _activations(compute: Compute, tokens: int, shape: Shape) -> float:
    """What one network keeps of a micro-batch for the backward pass."""
    width = NARROW if compute.dtype == "bf16" else WIDE
    stream = 2 * WIDE * shape.hidden  # a block's two inputs, float32
    block = stream + width * (4 * shape.hidden + 2 * shape.kv_width + 3 * shape.inner)
    if compute.gradient_checkpointing:
        return float(tokens * (shape.layers * WIDE * shape.hidden + block))
    return float(tokens * shape.layers * block)


def _host(compute: Compute, networks: Sequence[_Network], shape: Shape) -> float:
    """A whole model in each process that loads it, or where it is collected; and AdamW's state that is kept there."""
    whole = WIDE * shape.parameters() * (1 if _stage(compute) == 3 else compute.processes)
    changed = sum(network.changed for network in networks)
    return whole + (compute.processes * _part(compute, 3 * WIDE * changed, 1) if compute.offload else 0.0)


def table(settings: Settings, shape: Shape) -> str:
    """GB (1e9 bytes) of a GPU by role in the steps that train, and of a machine's own memory, as a Markdown table."""
    steps = {
        "sft": training_memory(settings.sft.training, settings.sft.lora, shape),
        "reward, cost": training_memory(settings.reward.training, settings.reward.lora, shape),
        "rl": rl_memory(settings.rl, shape),
    }
    parts = {name: found.always | found.sampling | found.updating for name, found in steps.items()}
    roles = parts["rl"]  # the others have no more
    rows = [[role, *(f"{found.get(role, 0) / 1e9:.1f}" for found in parts.values())] for role in roles]
    rows.append(["**most at once**", *(f"**{found.peak / 1e9:.1f}**" for found in steps.values())])
    rows.append(["machine", *(f"{found.host / 1e9:.0f}" for found in steps.values())])
    head = [["GB", *steps], ["---"] * (1 + len(steps))]
    return "\n".join(f"| {' | '.join(row)} |" for row in head + rows)


def main() -> None:
    """Print the table of a configuration."""
    from pipeline.overrides import resolve

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("config", help="a name, or a file, as -c takes it")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    given = parser.parse_args()
    print(table(resolve([given.config], []), SHAPES[given.shape]))


if __name__ == "__main__":
    main()
