"""Running a step from plain values: Kubeflow's way, and by hand."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.__main__ import main
from components.errors import InputError, TrainingFailure
from components.launch import launch, path_parameters, run_step, settings_class, step_function
from components.mlflow_run import MlflowRun
from components.termination import Terminated

SMALL = {"num_corpus": 20, "num_demonstrations": 20, "num_pairs": 20, "num_prompts": 20, "num_test_prompts": 20}


class FakeMetrics:
    """Kubeflow's metrics artifact: a path, and a place to log numbers."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.logged: dict[str, float] = {}

    def log_metric(self, name: str, value: float) -> None:
        self.logged[name] = value


def test_a_step_launched_by_kubeflow_leaves_outputs_metrics_and_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLUMBLINE_RUN_DIR", str(tmp_path / "run"))
    metrics = FakeMetrics(tmp_path / "task" / "metrics")
    doubles = {name: float(value) for name, value in SMALL.items()}
    values = launch("demo", doubles, metrics, "demo", raw=SimpleNamespace(path=str(tmp_path / "task" / "raw")))
    assert values["demo/prompts"] == 20.0
    assert (tmp_path / "task" / "raw" / "prompts.jsonl").exists()
    assert json.loads(Path(metrics.path).read_text()) == values == metrics.logged
    record = json.loads((tmp_path / "run" / "steps" / "demo.json").read_text())
    assert record["status"] == "succeeded"
    assert record["metrics"] == values
    assert record["seconds"] >= 0


def test_a_mistake_ends_the_process_with_its_message_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PLUMBLINE_RUN_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        launch("demo", {"num_pair": 20}, FakeMetrics(tmp_path / "metrics"), "demo", raw=None)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: demo.num_pair is unknown; did you mean demo.num_pairs?")
    assert json.loads((tmp_path / "steps" / "demo.json").read_text())["kind"] == "input"


def test_another_failure_is_raised_and_recorded_by_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(settings: Any, *, raw: Path) -> dict[str, float]:
        raise RuntimeError("out of tape")

    monkeypatch.setenv("PLUMBLINE_RUN_DIR", str(tmp_path))
    monkeypatch.setattr("components.demo.step.run", fail)
    with pytest.raises(RuntimeError):
        launch("demo", {}, FakeMetrics(tmp_path / "metrics"), "demo", raw=SimpleNamespace(path="raw"))
    record = json.loads((tmp_path / "steps" / "demo.json").read_text())
    assert (record["kind"], record["error"]) == ("failure", "RuntimeError: out of tape")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_unwritable_disk_is_one_message(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(settings: Any, *, raw: Path) -> dict[str, float]:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("components.demo.step.run", fail)
    message = f"^{tmp_path}: {os.strerror(number)}. Make room or allow writing there, then start the same command again"
    with pytest.raises(InputError, match=message):
        run_step("demo", {}, {"raw": tmp_path / "raw"}, metrics_file=tmp_path / "metrics", task="demo")


def test_sigterm_outside_training_ends_a_step_at_once_and_closes_what_is_tracked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, ended = [], []

    class Noted(MlflowRun):
        def log_params(self, settings: Any) -> None: ...
        def end(self, status: str) -> None:
            ended.append(status)

    def save(settings: Any, *, raw: Path) -> dict[str, float]:
        reached.append("begun")
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("done")
        return {}

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://nowhere")
    monkeypatch.setattr("components.tracking._step_run", lambda *_: Noted(None, "r", "e"))
    monkeypatch.setattr("components.demo.step.run", save)
    with pytest.raises(Terminated):
        run_step("demo", {}, {"raw": tmp_path / "raw"}, metrics_file=tmp_path / "metrics", task="demo")
    assert (reached, ended) == (["begun"], ["KILLED"])


def test_another_error_of_the_system_is_no_persons_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(settings: Any, *, raw: Path) -> dict[str, float]:
        raise ChildProcessError(errno.ECHILD, "no child")

    monkeypatch.setattr("components.demo.step.run", fail)
    with pytest.raises(ChildProcessError):
        run_step("demo", {}, {"raw": tmp_path / "raw"}, metrics_file=tmp_path / "metrics", task="demo")


STOPPED = "stopped by SIGTERM; the same command continues from the newest checkpoint, where there is one."


@pytest.mark.parametrize(
    ("error", "code", "record", "line"),
    [
        (
            TrainingFailure("the loss is nan"), 1,
            {"status": "failed", "kind": "failure", "error": "the loss is nan"}, "error: demo: the loss is nan",
        ),
        (
            Terminated(), 143,
            {"status": "stopped", "error": STOPPED}, f"demo: {STOPPED}",
        ),
    ],
    ids=["failure", "sigterm"],
)  # fmt: skip
def test_training_that_cannot_go_on_or_was_stopped_is_one_line_an_exit_code_and_a_record(
    error: BaseException, code: int, record: dict[str, str], line: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(settings: Any, *, raw: Path) -> dict[str, float]:
        raise error

    monkeypatch.setenv("PLUMBLINE_RUN_DIR", str(tmp_path))
    monkeypatch.setattr("components.demo.step.run", fail)
    with pytest.raises(SystemExit) as ended:
        launch("demo", {}, FakeMetrics(tmp_path / "metrics"), "demo", raw=SimpleNamespace(path="raw"))
    assert ended.value.code == code
    assert capsys.readouterr().err == f"{line}\n"
    recorded = json.loads((tmp_path / "steps" / "demo.json").read_text())
    assert {name: value for name, value in recorded.items() if name != "seconds"} == record
    assert main(["demo", "--raw", str(tmp_path / "raw")]) == code  # by hand the same
    assert capsys.readouterr().err == f"{line}\n"


def test_numbers_that_json_has_no_word_for_stay_out_of_kubeflows_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.demo.step.run", lambda settings, *, raw: {"a/b": float("nan"), "a/c": 1.0})
    metrics = FakeMetrics(tmp_path / "metrics")
    launch("demo", {}, metrics, "demo", raw=SimpleNamespace(path="raw"))
    assert metrics.logged == {"a/c": 1.0}


def test_partial_settings_keep_the_steps_own_defaults_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def keep(settings: Any, **_: Any) -> dict[str, float]:
        seen.append(settings)
        return {}

    monkeypatch.setattr("components.launch.step_function", lambda step: keep)
    run_step("reward", {"training": {"epochs": 5.0}}, {}, metrics_file=tmp_path / "m" / "metrics", task="cost")
    default = settings_class("reward")().training
    assert seen[0].training == default.model_copy(update={"epochs": 5})


def test_the_paths_of_a_step_are_told_from_its_signature() -> None:
    assert path_parameters(step_function("preprocess")) == {"raw": True, "data": False}


def test_an_unknown_step_is_named_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"'sfft' is not a step; accepted: demo, preprocess, .*, infer"):
        step_function("sfft")


def test_one_step_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "demo.yaml"
    settings.write_text(json.dumps(SMALL))
    assert main(["demo", "--settings", str(settings), "--raw", str(tmp_path / "raw")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["demo/prompts"] == 20.0
    assert json.loads((tmp_path / "raw.metrics" / "metrics.json").read_text()) == printed


def test_by_hand_a_missing_input_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preprocess", "--raw", str(tmp_path / "nothing"), "--data", str(tmp_path / "data")]) == 2
    assert capsys.readouterr().err == f"error: --raw is {tmp_path / 'nothing'}; no such file or folder.\n"


def test_by_hand_without_a_step_the_steps_are_listed() -> None:
    shown = subprocess.run([sys.executable, "-m", "components"], capture_output=True, text=True, check=True).stdout
    assert "Steps: demo, preprocess" in shown
