"""Memory of a GPU by arithmetic, against counts of real models and sums by hand."""

from pathlib import Path
from typing import Any

import pytest

from components.models import load_policy, with_lora
from components.rl.settings import RLSettings
from components.settings import Compute, Generation, Lora, Training
from pipeline.hardware import amount
from pipeline.memory import NARROW, SHAPES, WIDE, Shape, rl_memory, table, training_memory
from pipeline.overrides import CONFIGS, resolve
from pipeline.settings import Settings

pytestmark = pytest.mark.tried("memory of a GPU for 7B on 8 and 70B on 64", against="arithmetic; counts of tiny models")

MISTRAL_7B, LLAMA_70B = SHAPES["7b"], SHAPES["70b"]
GPU = 80e9 - 4e9
"""Bytes of an 80 GB GPU, less what the arithmetic leaves out."""


def test_parameters_are_those_of_the_published_models() -> None:
    assert MISTRAL_7B.parameters() == 7_241_732_096  # as its model card's files add up
    assert LLAMA_70B.parameters() == 70_553_706_496


def test_parameters_and_adapters_are_those_of_a_real_model(policy_folder: Path) -> None:
    model = load_policy(policy_folder)
    config: Any = model.config
    shape = Shape(
        config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.num_attention_heads,
        config.num_key_value_heads, config.vocab_size,
    )  # fmt: skip
    tied = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    assert shape.parameters() - tied == model.num_parameters()
    adapted = with_lora(model, Lora(rank=3))
    assert shape.adapters(3) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def settings(strategy: str = "ddp", offload: bool = False, **fields: Any) -> RLSettings:
    processes = 8
    compute = Compute(processes=processes, strategy=strategy, offload=offload)  # type: ignore[arg-type]
    return RLSettings(compute=compute, **fields)


@pytest.mark.parametrize(
    ("strategy", "offload", "always", "gradients"),
    [
        # of 3 networks of P weights: 4 for weights, 8 for AdamW; ZeRO 4 more for its copy, its parts divided by 8
        ("ddp", False, 4 + 8, 4),
        ("zero1", False, 4 + 12 / 8, 4),
        ("zero2", False, 4 + 12 / 8, 4 / 8),
        ("zero3", False, 16 / 8, 4 / 8),
        ("zero2", True, 4, 4 / 8),
        ("zero3", True, 4 / 8, 4 / 8),
    ],
)
def test_the_stages_divide_what_they_say(strategy: str, offload: bool, always: float, gradients: float) -> None:
    found, weights = rl_memory(settings(strategy, offload), MISTRAL_7B), MISTRAL_7B.parameters()
    trained = found.always["policy"] + found.always["critics"]
    assert trained == pytest.approx(3 * weights * always)
    assert found.updating["gradients"] == pytest.approx(3 * weights * gradients)
    assert found.sampling["gathered policy"] == (WIDE * weights if strategy == "zero3" else 0)


def test_frozen_models_are_whole_and_guests_are_next_to_nothing() -> None:
    weights = MISTRAL_7B.parameters()
    own = rl_memory(settings(frozen_dtype="bf16"), MISTRAL_7B).always
    assert [own[name] for name in ("reference", "reward model", "cost model")] == [NARROW * weights] * 3
    guests = rl_memory(settings(lora=Lora(rank=8), share_backbone=True), MISTRAL_7B).always
    assert guests["reference"] == 0 and guests["reward model"] == guests["cost model"] < 0.02 * weights


def test_keys_and_values_and_activations_by_hand() -> None:
    generation = Generation(max_prompt_tokens=100, max_new_tokens=28, batch_size=10)
    found = rl_memory(settings(generation=generation, micro_batch_size=2), Shape(8, 2, 16, 4, 2, 50))
    # 10 * 128 tokens, 2 layers, keys and values of 4 numbers, 2 bytes each
    assert found.sampling["keys and values"] == 10 * 128 * 2 * 2 * 4 * 2
    # 2 * 128 tokens, 3 networks, 2 layers: 2 * 8 numbers in 4 bytes, 4 * 8 + 2 * 4 + 3 * 16 in 2
    assert found.updating["activations"] == 2 * 128 * 3 * 2 * (2 * 8 * 4 + 2 * (4 * 8 + 2 * 4 + 3 * 16))


def test_where_weights_are_divided_guests_are_and_a_layer_is_gathered() -> None:
    given: dict[str, Any] = {"lora": Lora(rank=8), "share_backbone": True}
    guests = rl_memory(settings("zero3", **given), MISTRAL_7B)
    assert guests.always["reward model"] == WIDE * MISTRAL_7B.adapters(8) / 8
    # a block of 4 * 4096^2 in queries and outputs, keys and values of a quarter, three of 4096 * 14336, two norms
    block = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert guests.updating["gathered layer"] == WIDE * (block + 32000 * 4096)
    assert rl_memory(settings("zero2", **given), MISTRAL_7B).updating["gathered layer"] == 0
    full = rl_memory(settings("zero3"), MISTRAL_7B)  # of policy and two critics the embeddings are trained
    assert full.updating["gathered layer"] == WIDE * (block + 4 * 32000 * 4096)


def test_a_server_leaves_a_layer_of_the_policy_where_our_decoder_gathers_it_all() -> None:
    server = {"kind": "vllm", "url": "http://a", "weights": "/w"}
    served = rl_memory(settings("zero3", sampler=server), MISTRAL_7B).sampling
    assert served == {"gathered layer": WIDE * MISTRAL_7B.gathered()}
    assert rl_memory(settings("zero2", sampler=server), MISTRAL_7B).sampling == {"gathered layer": 0}


def test_copies_in_bfloat16_are_of_a_layer_where_no_more_is_kept() -> None:
    less = {"gradient_checkpointing": True}
    cases = [  # full weights are cached for a pass; frozen ones are kept by what is not computed again
        (Compute(), Lora(), MISTRAL_7B.parameters()),
        (Compute(**less), Lora(), MISTRAL_7B.parameters()),
        (Compute(), Lora(rank=1), MISTRAL_7B.parameters() + MISTRAL_7B.adapters(1)),
        (Compute(**less), Lora(rank=1), MISTRAL_7B.gathered()),
        (Compute(strategy="zero3", processes=2), Lora(), MISTRAL_7B.gathered()),
        (Compute(dtype="fp32"), Lora(), 0),
    ]
    for compute, lora, copied in cases:
        found = training_memory(Training(compute=compute), lora, MISTRAL_7B).updating
        assert found["weights in bfloat16"] == NARROW * copied


def test_a_machine_loads_a_model_for_every_process_unless_weights_are_divided() -> None:
    weights = WIDE * MISTRAL_7B.parameters()
    offload = Compute(strategy="zero2", processes=4, nodes=2, offload=True)
    for compute, host in [
        (Compute(processes=8), 8 * weights),
        (Compute(processes=8, nodes=2, strategy="zero3"), weights),
        (offload, 4 * weights + 4 * 3 * weights / 8),
    ]:
        assert training_memory(Training(compute=compute), Lora(), MISTRAL_7B).host == host


def test_the_7b_settings_fit_eight_gpus_of_80_gb() -> None:
    chosen = resolve([CONFIGS / "7b-8x80gb.yaml"], [])
    assert chosen.rl.compute.processes == chosen.resources.rl.gpus == 8
    assert 40e9 < rl_memory(chosen.rl, MISTRAL_7B).peak < GPU
    for step in (chosen.sft, chosen.reward, chosen.cost):
        found = training_memory(step.training, step.lora, MISTRAL_7B)
        assert 30e9 < found.peak < GPU and found.host < amount(chosen.resources.sft.memory)
    alone = chosen.rl.model_copy(update={"share_backbone": False, "lora": Lora()})
    assert rl_memory(alone, MISTRAL_7B).peak > 2 * GPU  # so that it is the settings that make it fit


@pytest.fixture(scope="module")
def large() -> Settings:
    return resolve([CONFIGS / "70b-64x80gb.yaml"], [])


def test_the_70b_settings_take_64_gpus_of_80_gb(large: Settings) -> None:
    training = [step.training.compute for step in (large.sft, large.reward, large.cost)]
    assert {(compute.nodes, compute.processes) for compute in training} == {(8, 8)}
    asked = large.resources.sft
    assert large.resources.reward == large.resources.cost == large.resources.rl == asked and asked.gpus == 8
    assert (large.rl.compute.nodes, large.rl.compute.processes) == (7, 8)  # and a machine of 8 for the server
    assert large.rl.prompts_per_rollout % 56 == 0 == large.rl.minibatch_size % 56
    peaks = [training_memory(step.training, step.lora, LLAMA_70B) for step in (large.sft, large.reward, large.cost)]
    for found in (*peaks, rl_memory(large.rl, LLAMA_70B)):
        assert 35e9 < found.peak < GPU
        assert 282e9 < found.host < 283e9  # the whole policy, where it is collected
        assert found.host + amount(asked.shm) < amount(asked.memory) / 2  # beside eight processes
    assert NARROW * LLAMA_70B.parameters() / 8 < 18e9 < GPU  # in bfloat16 on each of the server's GPUs


def test_the_70b_by_role_by_hand(large: Settings) -> None:
    found = rl_memory(large.rl, LLAMA_70B)
    # adapters of rank 64 on 80 blocks: 8192 + 8192 twice, 8192 + 1024 twice, 8192 + 28672 three times
    adapters = 80 * 64 * (2 * 16384 + 2 * 9216 + 3 * 36864)
    assert adapters == 828_375_040
    # a block: 8192^2 twice, 8192 * 1024 twice, 8192 * 28672 three times, two norms; and the output layer
    layer = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192 + 128256 * 8192
    head = 8192 * 8193 + 8193
    hand = {
        "policy": (4 * (70_553_706_496 + adapters) + 12 * adapters) / 56,
        "critics": 16 * 2 * head / 56,
        "reference": 0,  # the policy without its adapters
        "reward model": 4 * adapters / 56,
        "cost model": 4 * adapters / 56,
    }
    assert found.always == pytest.approx(hand)
    tokens = 8 * 1024
    # of each of 80 blocks its input in float32; of one all that its backward pass reads
    kept = 80 * 4 * 8192 + 2 * 4 * 8192 + 2 * (4 * 8192 + 2 * 1024 + 3 * 28672)
    assert found.updating == pytest.approx({
        "gradients": 4 * (adapters + 2 * head) / 56,
        "activations": tokens * kept,
        "gathered layer": 4 * layer,
        "weights in bfloat16": 2 * layer,
        "buckets": 402_653_184,
    })  # fmt: skip
    assert found.sampling == {"gathered layer": 4 * layer}


@pytest.mark.parametrize(
    ("changed", "least"),
    [
        ({"compute": {"nodes": 7, "processes": 8, "strategy": "zero2"}}, 282e9),  # weights whole in every process
        ({"sampler": {"kind": "native"}}, 282e9),  # gathered while our decoder samples
        ({"share_backbone": False}, 2 * 141e9),  # reward and cost model whole, in bfloat16
        ({"lora": {"rank": 0}}, 3 * 141e9),  # and the reference
        ({"compute": {"nodes": 7, "processes": 8, "strategy": "zero3"}}, 200e9),  # all activations are kept
    ],
)
def test_the_70b_fits_by_its_settings_alone(large: Settings, changed: dict[str, Any], least: float) -> None:
    given = {"frozen_dtype": "bf16"} | changed
    other = RLSettings.model_validate(large.rl.model_dump(exclude_none=True) | given)
    assert rl_memory(other, LLAMA_70B).peak > least > GPU


@pytest.mark.parametrize(("config", "shape"), [("7b-8x80gb", "7b"), ("70b-64x80gb", "70b")])
def test_the_tables_are_those_of_the_arithmetic(config: str, shape: str) -> None:
    told = (CONFIGS.parent / "README.md").read_text("utf-8")
    assert table(resolve([config], []), SHAPES[shape]) in told
