"""The settings tree survives what Kubeflow does to it."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from components.errors import InputError
from components.launch import STEPS, settings_class
from components.parsing import parse
from components.rl.settings import RLSettings
from components.settings import Compute, OverlapSettings
from pipeline.hardware import Resources
from pipeline.overrides import CONFIGS, resolve
from pipeline.settings import NOTIFY, SOURCES, TASKS, Settings

CONFIG_NAMES = (
    "70b-64x80gb", "7b-8x80gb", "async-rlhf-best-of-2", "async-rlhf-online-dpo", "async-rlhf-ppo", "async-rlhf-rloo",
    "best_of_k", "default", "demo", "dpo", "grpo", "hh", "online_dpo", "ppo", "ppo_lag", "rloo", "safe-rlhf-dpo",
    "safe-rlhf-ppo", "safe-rlhf-ppo-lag",
)  # fmt: skip


def as_struct(value: Any) -> Any:
    """What a protobuf Struct makes of a value: every number a double."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return float(value)
    if isinstance(value, list):
        return [as_struct(item) for item in value]
    if isinstance(value, dict):
        return {key: as_struct(item) for key, item in value.items()}
    return value


def test_every_configuration_of_ours_is_here() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == sorted(CONFIG_NAMES)


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_a_steps_settings_come_back_from_kubeflow_as_they_went(name: str) -> None:
    settings = resolve([Path(name)])
    for task in settings.tasks():
        step = "reward" if task == "cost" else task
        sent = json.loads(json.dumps(as_struct(settings.step(task).model_dump(mode="json", exclude_none=True))))
        assert parse(settings_class(step), sent) == settings.step(task), task


def test_there_is_a_settings_class_for_every_step_and_a_field_for_every_task() -> None:
    assert {settings_class(step).__name__.lower() for step in STEPS} == {f"{step}settings" for step in STEPS}
    assert set(TASKS) == {*STEPS, "cost"}
    assert {SOURCES, *TASKS, NOTIFY} == set(Resources.model_fields)
    assert set(TASKS) < set(Settings.model_fields)


def test_the_cost_task_exists_only_for_an_algorithm_that_needs_it() -> None:
    assert "cost" in resolve([Path("ppo_lag")]).tasks()
    assert "cost" not in resolve([Path("ppo")]).tasks()


def test_settings_printed_by_config_make_the_same_settings_again(tmp_path: Path) -> None:
    from pipeline.documents import write_document

    settings = resolve([Path("demo")], ["seed=3"])
    path = tmp_path / "resolved.yaml"
    path.write_text(write_document(settings.model_dump(mode="json", exclude_none=True)))
    assert resolve([path]) == settings


@pytest.mark.parametrize(
    ("config", "override", "words"),
    [
        ("demo", "sft.training.max_length=4096", "above validate.max_length 128"),
        ("demo", "rl.generation.max_prompt_tokens=4000", "base.max_positions is 256"),
        ("demo", "validate.dimensions=[helpful]", "cost.dimension is harmless"),
        ("demo", "rl.algorithm.lambda_init=50", "above lambda_max"),
        ("demo", "rl.reward_scorer.kind=ensemble", "reward.members is 1. Set it to 2 or more"),
        ("demo", "rl.cost_scorer.kind=ensemble", "cost.members is 1. Set it to 2 or more"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_before_anything_runs(
    config: str, override: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        resolve([CONFIGS / f"{config}.yaml"], [override])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"strategy": "zero2"}, "strategy is zero2 and processes is 1"),
        ({"processes": 2, "offload": True}, "offload is set and strategy is ddp"),
    ],
)
def test_what_one_process_cannot_divide_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Compute(**fields)
    assert Compute(nodes=2, strategy="zero2").nodes == 2  # one process on each of two machines


def test_nobody_samples_ahead_for_several_processes() -> None:
    with pytest.raises(ValidationError, match="overlap is set and compute starts 2 processes"):
        RLSettings(overlap=OverlapSettings(), compute=Compute(processes=2))
