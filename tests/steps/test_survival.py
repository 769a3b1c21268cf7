"""Steps that are killed at any update and started again end as those that nobody killed."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components import termination
from components import training as training_module
from components.artifacts import Metrics, verify_manifest
from components.reward import step as reward_step
from components.reward.settings import RewardSettings
from components.settings import Lora, StepSettings
from components.sft import step as sft_step
from components.sft.settings import SFTSettings
from starts import Stop


@pytest.fixture
def work(
    quick_training: Callable[..., Any], data_folder: Path, policy_folder: Path
) -> Callable[..., dict[str, Any]]:
    """What to run of a task: some twenty updates, evaluations among them."""

    def chosen(task: str) -> dict[str, Any]:
        training = quick_training(epochs=12, eval_every=4, checkpoint_every=2)
        settings: dict[str, StepSettings] = {
            "sft": SFTSettings(training=training, lora=Lora(rank=2, dropout=0.2)),  # dropout draws random numbers
            "reward": RewardSettings(training=training),
            "cost": RewardSettings(kind="cost", dimension="harmless", training=training),
            "ensemble": RewardSettings(members=3, training=training.model_copy(update={"epochs": 4})),
        }
        start = "base" if task == "sft" else "sft"
        return {
            "step": "sft" if task == "sft" else "reward",
            "settings": settings[task],
            "inputs": {"data": data_folder, start: policy_folder},
            "task": task,
        }

    return chosen


@pytest.mark.parametrize("task", ["sft", "reward", "cost", "ensemble"])
def test_a_step_stopped_at_any_update_and_started_again_ends_as_one_that_was_not(
    task: str, work: Any, starts: Any, tmp_path: Path
) -> None:
    whole = starts.run(**work(task), folder=tmp_path / "whole")
    total = len(whole.history)
    assert whole.exit_codes == [0] and total >= 20
    members = 3 if task == "ensemble" else 1
    assert [row["update"] for row in whole.history] == list(range(1, total // members + 1)) * members
    draws = random.Random(task)
    places = sorted(draws.sample(range(1, total * 2 // 3), 3))
    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)
    stops = [Stop(rows, None, 0.01 * draws.random(), sent) for rows, sent in zip(places, signals, strict=True)]
    stopped = starts.run(**work(task), folder=tmp_path / "stopped", stops=stops)
    assert stopped.exit_codes == [-9, 143, -9, 0]
    assert stopped.result == whole.result
    assert stopped.starts[1].late_updates <= 1
    assert not list(tmp_path.rglob("tensors.safetensors"))


@pytest.mark.parametrize("task", ["sft", "reward", "cost", "ensemble"])
def test_sigterm_while_the_model_is_saved_costs_no_training(
    task: str, work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = work(task)
    module = {"sft": sft_step, "reward": reward_step}[made["step"]]
    training = made["settings"].training.model_copy(update={"checkpoint_every": 0})
    settings = made["settings"].model_copy(update={"training": training})

    def run_here(folder: Path) -> Metrics:
        with termination.watch() as stop, stop.interruptible():
            metrics: Metrics = module.run(settings, **made["inputs"], model=folder / "m")
        return metrics

    whole = run_here(tmp_path / "a")

    def stopped_half_way(model: Any, *_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_model", stopped_half_way)
        with pytest.raises(termination.Terminated):
            run_here(tmp_path / "b")
    monkeypatch.setattr(training_module, "_update", None)  # nothing is left to learn
    assert run_here(tmp_path / "b") == whole
    assert verify_manifest(tmp_path / "a" / "m") == verify_manifest(tmp_path / "b" / "m")
