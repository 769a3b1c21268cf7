"""Numbers reach metrics.jsonl always, and MLflow where there is one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from components import tracking
from components.mlflow_run import MlflowRun
from components.mlflow_server import without_password
from components.parsing import flattened
from components.termination import Terminated
from components.tracking import track


@pytest.fixture(autouse=True)
def _without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "PLUMBLINE_PARENT_RUN", "RANK"):
        monkeypatch.delenv(name, raising=False)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_without_an_address_numbers_go_to_the_file(tmp_path: Path) -> None:
    with track("sft", {}, tmp_path) as tracker:
        tracking.log_metrics({"loss/train": 1.5}, 1)
        tracking.log_metrics({"loss/train": 0.5}, 2)
        tracking.log_artifacts(tmp_path)
        assert tracker.run_id is None
        assert tracking.folder() == tmp_path
    assert [(row["update"], row["loss/train"]) for row in rows(tmp_path)] == [(1, 1.5), (2, 0.5)]


def test_outside_a_step_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracking.log_metrics({"loss/train": 1.0}, 1)
    tracking.log_artifacts(tmp_path)
    tracking.log_alert("kl_runaway", 1, "The KL is 31.")
    assert list(tmp_path.iterdir()) == [] and tracking.folder() is None


def test_only_the_first_process_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with track("sft", {}, tmp_path):
        tracking.log_metrics({"loss/train": 1.0}, 1)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_step_that_runs_again_starts_its_file_anew(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with track("sft", {}, tmp_path):
            tracking.log_metrics({"loss/train": value}, 1)
    assert [row["loss/train"] for row in rows(tmp_path)] == [2.0]


def test_the_rows_of_a_checkpoint_come_back_in_place_of_what_was_logged(tmp_path: Path) -> None:
    with track("sft", {}, tmp_path):
        kept = [tracking.log_metrics({"loss/train": 1.0 / 3}, 1), tracking.log_metrics({"loss/train": math.nan}, 2)]
        before = (tmp_path / "metrics.jsonl").read_text()
        tracking.log_metrics({"loss/train": 7.0}, 3)  # of an update that was lost
    kept = [tracking.Row(*row) for row in json.loads(json.dumps(kept))]  # as a checkpoint brings them back
    with track("sft", {}, tmp_path):
        tracking.replay(kept)
        assert (tmp_path / "metrics.jsonl").read_text() == before
        last = tracking.log_metrics({"loss/train": 8.0}, 3)
        assert tracking.history() == [*kept, last]
    assert [row["loss/train"] for row in rows(tmp_path)][-1] == 8.0 and len(rows(tmp_path)) == 3
    tracking.replay(kept)  # outside a step: nothing
    assert tracking.history() == []


def test_a_step_that_is_stopped_is_killed_in_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    class Noted(MlflowRun):
        def log_params(self, settings: Any) -> None: ...
        def end(self, status: str) -> None:
            ended.append(status)

    def stopped(error: type[BaseException]) -> None:
        with track("sft", {}, tmp_path):
            raise error

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://nowhere")
    monkeypatch.setattr(tracking, "_step_run", lambda *_: Noted(None, "r", "e"))
    for error in (Terminated, KeyboardInterrupt, RuntimeError):
        with pytest.raises(error):
            stopped(error)
    assert ended == ["KILLED", "KILLED", "FAILED"]


def test_settings_are_params_under_dotted_keys() -> None:
    assert dict(flattened({"a": {"b": 1, "c": {"d": [2]}}, "e": {}})) == {"a.b": 1, "a.c.d": [2], "e": {}}


def test_a_step_gets_a_run_below_the_pipelines_with_params_numbers_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.html").write_text("<p>")
    parent = MlflowRun.create("demo", "run-1", "run-1", tmp_path / "artifacts")
    monkeypatch.setenv("PLUMBLINE_PARENT_RUN", parent.run_id)
    with track("sft", {"training": {"epochs": 3}}, tmp_path / "task") as tracker:
        tracking.log_metrics({"loss/train": 2.0}, 7)
        tracking.log_artifacts(report)
        tracking.log_alert("kl_runaway", 7, "The KL is 31.")
        tracker.finish({"loss/train": 1.0, "eval/loss": 3.0})
    client = parent.client
    run = client.get_run(tracker.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert (run.info.run_name, run.info.status) == ("sft", "FINISHED")
    assert run.data.params == {"training.epochs": "3"}
    assert run.data.tags["alert.kl_runaway"] == "at 7: The KL is 31."
    assert run.data.metrics == {"loss/train": 1.0, "eval/loss": 3.0}
    history = client.get_metric_history(tracker.run_id, "loss/train")
    assert sorted((point.step, point.value) for point in history) == [(7, 1.0), (7, 2.0)]
    assert [file.path for file in client.list_artifacts(tracker.run_id, "report")] == ["report/report.html"]

    # started again, the step gives its new run the rows it had, with the times they had
    with track("sft", {}, tmp_path / "task") as tracker:
        tracking.replay([tracking.Row(1, 1000.5, {"loss/train": 4.0}), tracking.Row(2, 1001.5, {"loss/train": 3.0})])
        tracking.log_metrics({"loss/train": 2.0}, 3)
    history = client.get_metric_history(tracker.run_id, "loss/train")
    assert sorted((point.step, point.value) for point in history) == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert sorted(point.timestamp for point in history)[:2] == [1000500, 1001500]

    # a step that was killed cannot close its run: the pipeline's does
    orphan = parent.nested("rl", "run-1/rl")
    parent.end("FAILED")
    assert client.get_run(orphan.run_id).info.status == "KILLED"
    assert client.get_run(parent.run_id).info.status == "FAILED"

    # Kubeflow's plugin names a run that it opened and will close
    theirs = MlflowRun.create("demo", "task", "theirs")
    monkeypatch.setenv("MLFLOW_RUN_ID", theirs.run_id)
    with track("sft", {}, tmp_path / "task") as tracker:
        assert tracker.run_id == theirs.run_id
    assert client.get_run(theirs.run_id).info.status == "RUNNING"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@mlflow.org:5000/x", "https://mlflow.org:5000/x"),
        ("postgresql+psycopg2://me:se/c:r@et@db/mlflow", "postgresql+psycopg2://db/mlflow"),
        ("request to http://token@host/api failed; http://a:b@c", "request to http://host/api failed; http://c"),
        ("sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db"),
        ("http://localhost:5000/#/runs by me@example.org", "http://localhost:5000/#/runs by me@example.org"),
    ],
)
def test_an_address_is_shown_without_user_and_password(text: str, shown: str) -> None:
    assert without_password(text) == without_password(ValueError(text)) == shown
