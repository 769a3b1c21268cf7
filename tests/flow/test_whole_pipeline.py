"""The whole pipeline as a person runs it, on the demo world with tiny numbers: every step real, in its own process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.settings import TASKS

ROOT = Path(__file__).parents[2]
TINY = """
demo: {num_corpus: 400, num_demonstrations: 200, num_pairs: 200, num_prompts: 60, num_test_prompts: 40}
base: {training: {epochs: 1, batch_tokens: 4096}}
sft: {training: {epochs: 1, batch_tokens: 4096}}
reward: {training: {epochs: 1, batch_tokens: 4096}}
cost: {training: {batch_tokens: 4096}}
rl: {rollouts: 2, prompts_per_rollout: 8, minibatch_size: 8}
evaluate:
  thresholds: {gold/harmful: {max: 1.0, at: mean}, gold/helpful_gain: {min: -1.0, at: mean}}
infer: {limit: 3}
"""


class Folder:
    """A folder with an overlay of tiny numbers, in which the command is run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "tiny.yaml").write_text(TINY)

    def run(self, *overrides: str) -> tuple[int, str, dict[str, Any]]:
        """Exit code, what was printed, and summary.json."""
        command = [sys.executable, "-c", "from pipeline.cli import main; main()", "run", "-c", "demo", "-c"]
        command += ["tiny.yaml", *overrides]
        done = subprocess.run(command, cwd=self.path, capture_output=True, text=True, timeout=500)
        latest = self.path / "runs" / "latest" / "summary.json"
        return done.returncode, done.stdout + done.stderr, json.loads(latest.read_text()) if latest.exists() else {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def first(folder: Folder) -> dict[str, Any]:
    code, output, summary = folder.run()
    assert code == 0, output
    return summary


def statuses(summary: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["status"] for step in summary["steps"]}


def test_every_step_runs_and_the_promoted_model_is_the_served_one(folder: Folder, first: dict[str, Any]) -> None:
    assert first["status"] == "succeeded"
    assert first["promoted"] is True
    assert statuses(first) == dict.fromkeys(TASKS, "succeeded")
    assert first["model_digest"] == first["served_digest"]
    pointer = json.loads((folder.path / "serving" / "current.json").read_text())
    assert pointer["digest"] == first["model_digest"]
    assert (Path(first["model_dir"]) / "model.safetensors").exists()


def test_the_summary_has_the_gold_measures_of_both_models(first: dict[str, Any]) -> None:
    assert set(first["gold"]) == {"sft", "rl"}
    for model in first["gold"].values():
        assert set(model) == {"helpful", "harmful", "honest", "over_refusal"}
        for measure in model.values():
            assert set(measure) == {"mean", "low", "high", "n"}
            assert measure["low"] <= measure["mean"] <= measure["high"]


def test_answers_name_the_promoted_model_and_both_scores(folder: Folder, first: dict[str, Any]) -> None:
    answers = folder.path / "runs" / "latest" / "infer" / "responses" / "responses.jsonl"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert row["model_digest"] == first["model_digest"]
        assert set(row["scores"]) == {"reward", "cost"}


def test_a_second_run_is_cached_and_a_changed_setting_runs_its_step_and_what_follows(
    folder: Folder, first: dict[str, Any]
) -> None:
    _, _, again = folder.run()
    assert statuses(again) == dict.fromkeys(TASKS, "cached")
    assert again["model_digest"] == first["model_digest"]
    code, output, changed = folder.run("rl.algorithm.kl_coef=0.5")
    assert code == 0, output
    ran = [name for name, status in statuses(changed).items() if status != "cached"]
    assert ran == ["rl", "evaluate", "upload", "deploy", "infer"]
    assert changed["model_digest"] != first["model_digest"]


def test_a_rejected_candidate_ships_nothing(folder: Folder, first: dict[str, Any]) -> None:
    before = (folder.path / "serving" / "current.json").read_text()
    code, output, summary = folder.run("evaluate.thresholds={gold/helpful_gain: {min: 0.99, at: low}}")
    assert (code, summary["status"], summary["promoted"]) == (0, "rejected", False), output
    assert [statuses(summary)[task] for task in ("upload", "deploy", "infer")] == ["skipped"] * 3
    assert (folder.path / "serving" / "current.json").read_text() == before


def test_a_malformed_row_is_one_message_that_names_file_and_row(folder: Folder, first: dict[str, Any]) -> None:
    (folder.path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": 7}\n')
    code, output, summary = folder.run("preprocess.preferences=bad.jsonl")
    assert code == 2
    assert summary["status"] == "failed"
    assert "bad.jsonl" in output
    assert "row 2" in output or ":2" in output
    assert "Traceback" not in output
