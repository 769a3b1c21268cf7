"""Memory of a GPU in the rl step, by arithmetic: what each role takes up, before anything is bought or started.

In bytes, from the settings and the shape of the model (all models are taken to have the policy's). Weights that are
trained are float32, and so are gradients and AdamW's two moments; ZeRO keeps a copy of its part of the weights for
AdamW. What ZeRO-3 divides is gathered while responses are sampled. Left out: the CUDA context (half a gigabyte), what
the allocator loses to fragments, and logits, which exist a few megabytes at a time.
"""

from dataclasses import dataclass
from typing import NamedTuple

from components.rl.settings import RLSettings
from components.settings import NativeSamplerSettings

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

    def parameters(self) -> int:
        """Weights, the embeddings and an output layer of their own among them."""
        block = sum(inputs * outputs for inputs, outputs in self.linears) + 2 * self.hidden
        return self.layers * block + self.hidden + 2 * self.vocab * self.hidden

    def largest(self) -> int:
        """Weights that are used together: a block's, or the output layer's."""
        return max(sum(inputs * outputs for inputs, outputs in self.linears), self.vocab * self.hidden)

    def adapters(self, rank: int) -> int:
        """Weights of low-rank adapters on every linear layer of the blocks."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.linears)


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by role: all the time, while responses are sampled, and while the weights are updated."""

    always: dict[str, float]
    sampling: dict[str, float]
    updating: dict[str, float]

    @property
    def peak(self) -> float:
        """The most that there is at once."""
        return sum(self.always.values()) + max(sum(self.sampling.values()), sum(self.updating.values()))


def rl_memory(settings: RLSettings, shape: Shape) -> Memory:
    """The memory of each GPU in the rl step."""
    compute, lora = settings.compute, settings.lora.rank > 0
    trained = shape.adapters(settings.lora.rank) if lora else shape.parameters()
    heads = 0 if settings.share_backbone else len(settings.critics)
    changed = trained + heads * shape.parameters()  # critics of their own are trained whole
    policy = shape.parameters() + (trained if lora else 0)
    held = policy + shape.parameters() * heads
    processes, stage = compute.nodes * compute.processes, int(compute.strategy.removeprefix("zero").replace("ddp", "0"))

    def part(number: float, least: int) -> float:
        return number / processes if stage >= least else number

    always = {
        "policy and critics: weights": part(WIDE * held, 3),
        "policy and critics: AdamW": 0 if compute.offload else part(2 * WIDE * changed, 1),
        "policy and critics: AdamW's weights": 0 if compute.offload or not stage else part(WIDE * changed, 1),
        **_frozen(settings, shape),
    }
    sampling = {"gathered policy": WIDE * policy if stage == 3 else 0, **_sampling(settings, shape)}
    updating = {
        "gradients": part(WIDE * changed, 2),
        "activations": (1 + heads) * _activations(settings, shape),
        "buckets": BUCKETS,
        "a gathered layer": WIDE * shape.largest() if stage == 3 else 0,
    }
    return Memory(always, sampling, updating)


def _frozen(settings: RLSettings, shape: Shape) -> dict[str, float]:
    """What is only read, whole in every process: reference, reward and cost model."""
    width, lora = NARROW if settings.frozen_dtype == "bf16" else WIDE, settings.lora.rank > 0
    guest = settings.share_backbone and lora  # an adapter on the policy, of a rank like the policy's, and a head
    model = WIDE * shape.adapters(settings.lora.rank) if guest else width * shape.parameters()
    found = {"reference": 0.0 if lora else width * shape.parameters()}
    for name, scorer in (("reward", settings.reward_scorer), ("cost", settings.cost_scorer)):
        if name in settings.teachers:
            found[f"{name} model"] = model if scorer.kind == "model" else 0.0
    return found


def _sampling(settings: RLSettings, shape: Shape) -> dict[str, float]:
    """The decoder's copy of the weights, and its keys and values; a server has its own."""
    if not isinstance(settings.sampler, NativeSamplerSettings):
        return {"merged copy for the server": WIDE * shape.parameters() if settings.lora.rank else 0}
    generation, width = settings.generation, NARROW if settings.compute.dtype == "bf16" else WIDE
    tokens = generation.batch_size * (generation.max_prompt_tokens + generation.max_new_tokens)
    return {
        "decoder's weights": width * shape.parameters(),
        "keys and values": 2 * width * tokens * shape.layers * shape.kv_width,
    }


def _activations(settings: RLSettings, shape: Shape) -> float:
    """What one network keeps of a micro-batch for the backward pass."""
    generation, width = settings.generation, NARROW if settings.compute.dtype == "bf16" else WIDE
    tokens = settings.micro_batch_size * (generation.max_prompt_tokens + generation.max_new_tokens)
    stream = 2 * WIDE * shape.hidden  # a block's two inputs, float32
    block = stream + width * (4 * shape.hidden + 2 * shape.kv_width + 3 * shape.inner)
    if settings.compute.gradient_checkpointing:
        return float(tokens * (shape.layers * WIDE * shape.hidden + block))
    return float(tokens * shape.layers * block)
