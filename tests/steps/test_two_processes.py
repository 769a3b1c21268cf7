"""A step that starts its own processes: two of them, by torchrun, learn what one learns with twice the accumulation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from components.launch import run_step
from components.sft.settings import SFTSettings


def test_two_processes_learn_what_one_learns(
    quick_training: Callable[..., Any], data_folder: Path, policy_folder: Path, tmp_path: Path
) -> None:
    found = []
    for processes in (1, 2):
        training = quick_training(epochs=2, batch_tokens=96, accumulation=2 // processes)
        compute = training.compute.model_copy(update={"processes": processes})
        settings = SFTSettings(training=training.model_copy(update={"compute": compute})).model_dump(mode="json")
        folder = tmp_path / str(processes)
        paths: dict[str, Path | None] = {"data": data_folder, "base": policy_folder, "model": folder / "model"}
        metrics = run_step("sft", settings, paths, metrics_file=folder / "metrics.json", task="sft")
        assert json.loads((folder / "metrics.json").read_text("utf-8")) == metrics
        lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
        assert len(lines) == 2 * 3  # 5 micro-batches an epoch: two processes cannot share the last one
        found.append((metrics, load_file(folder / "model" / "model.safetensors")))
    (alone, weights), (shared, learned) = found
    assert shared == pytest.approx(alone, rel=1e-4)
    assert all(learned[name].allclose(weight, rtol=1e-3, atol=1e-5) for name, weight in weights.items())
