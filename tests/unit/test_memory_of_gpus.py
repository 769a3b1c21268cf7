"""Memory of a GPU by arithmetic, against counts of real models and sums by hand."""

from pathlib import Path
from typing import Any

import pytest

from components.models import load_policy, with_lora
from components.rl.settings import RLSettings
from components.settings import Compute, Generation, Lora
from pipeline.memory import NARROW, WIDE, Shape, rl_memory
from pipeline.overrides import resolve

CONFIGS = Path(__file__).parents[2] / "pipeline" / "configs"
MISTRAL_7B = Shape(hidden=4096, layers=32, inner=14336, heads=32, kv_heads=8, vocab=32000)
LLAMA_70B = Shape(hidden=8192, layers=80, inner=28672, heads=64, kv_heads=8, vocab=128256)
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
    trained = sum(value for name, value in found.always.items() if name.startswith("policy and critics"))
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


def test_the_7b_settings_fit_eight_gpus_of_80_gb() -> None:
    chosen = resolve([CONFIGS / "7b-8x80gb.yaml"], [])
    assert chosen.rl.compute.processes == chosen.resources.rl.gpus == 8
    assert 40e9 < rl_memory(chosen.rl, MISTRAL_7B).peak < GPU
    alone = chosen.rl.model_copy(update={"share_backbone": False, "lora": Lora()})
    assert rl_memory(alone, MISTRAL_7B).peak > 2 * GPU  # so that it is the settings that make it fit
