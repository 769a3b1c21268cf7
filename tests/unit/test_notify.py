"""The report on a run's end, and the MLflow run that a cluster's tasks share, against a real MLflow database."""

import logging
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl, local
from kfp.dsl import PipelineTaskFinalStatus
from kfp.local import config

from components import tracking, webhook
from components.component import component
from components.mlflow_run import MlflowRun
from components.notify import ending
from components.notify.component import notify
from components.pipeline_run import failures, found, found_or_made
from components.tracking import track

VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "PLUMBLINE_PIPELINE_RUN", "RANK")


@pytest.fixture(autouse=True)
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What went to the webhook; the environment is empty."""
    monkeypatch.setenv(tracking.PARENT_RUN, "")  # so that what a step sets here is taken back
    for name in (*VARIABLES, tracking.PARENT_RUN):
        monkeypatch.delenv(name, raising=False)
    messages: list[dict[str, str]] = []
    monkeypatch.setattr(webhook, "send", lambda message: messages.append(message) or "")
    return messages


def final(state: str, message: str | None = None) -> PipelineTaskFinalStatus:
    return PipelineTaskFinalStatus(state, "jobs/1", "exit-handler-1", None, message)


@pytest.mark.parametrize(
    ("state", "message", "status", "error"),
    [
        ("SUCCEEDED", None, "succeeded", ""),
        ("COMPLETE", None, "succeeded", ""),
        ("FAILED", "rl: no node has 8 GPUs", "failed", "rl: no node has 8 GPUs"),
        ("FAILED", None, "failed", "Kubeflow gives no reason for the state FAILED"),
        ("CANCELLED", None, "cancelled", "Kubeflow gives no reason for the state CANCELLED"),
        ("CANCELED", "by a person", "cancelled", "by a person"),
        ("RUNNING", None, "unknown", "Kubeflow gives no reason for the state RUNNING"),
    ],
)
def test_kubeflows_states_become_one_line_and_one_message(
    state: str, message: str | None, status: str, error: str,
    sent: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("PLUMBLINE_PIPELINE_RUN", "7-1")
    with caplog.at_level(logging.INFO):
        notify.python_func("hh", final(state, message))
    assert sent == [{"run": "7-1", "status": status, "error": error, "pipeline": "hh"}]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"run 7-1 of hh {status}" + (f": {error}" if error else "")


def test_a_webhook_that_fails_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(webhook, "send", lambda message: "the webhook got no word of it")
    ending.report("hh", final("SUCCEEDED"))
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "the webhook got no word of it"
    ]


def test_an_mlflow_that_fails_is_a_warning_without_its_password(
    sent: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionError("no route to http://me:s3cr3t@mlflow")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cr3t@mlflow")
    monkeypatch.setenv("PLUMBLINE_PIPELINE_RUN", "7-1")
    monkeypatch.setattr(MlflowRun, "of_start", refuse)
    ending.report("hh", final("SUCCEEDED"))
    assert "MLflow failed (no route to http://mlflow)" in caplog.text and "s3cr3t" not in caplog.text
    assert sent[0]["status"] == "succeeded"


@component
def stumble() -> None:
    raise RuntimeError("the loss is no number")


def test_kubeflows_own_executor_hands_the_final_status_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @dsl.pipeline(name="hh")
    def pipeline() -> None:
        with dsl.ExitHandler(notify(pipeline="hh"), "run"):
            stumble()

    monkeypatch.setenv("PLUMBLINE_PIPELINE_RUN", "7-1")
    runner = local.SubprocessRunner(use_venv=False)
    local.init(runner=runner, pipeline_root=str(tmp_path), raise_on_error=False)
    try:
        pipeline()
    finally:
        config.LocalExecutionConfig.instance = None
    assert "run 7-1 of hh failed: Task exit-handler-1 failed." in capsys.readouterr().out


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "hh")
    monkeypatch.setenv("PLUMBLINE_PIPELINE_RUN", "7-1")


def step(name: str, folder: Path, error: Exception | None = None) -> str:
    """A step in a pod of its own: its MLflow run."""
    with pytest.MonkeyPatch.context() as pod:
        pod.setenv(tracking.PARENT_RUN, "")
        pod.delenv(tracking.PARENT_RUN)
        try:
            with track(name, {}, folder) as tracker:
                run_id = tracker.run_id
                if error:
                    raise error
        except ValueError:
            pass
    assert run_id is not None
    return run_id


def race(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Two tasks look for the run before either has made one: what they end up with."""
    from mlflow import MlflowClient

    taken: list[Any] = []
    create_run = MlflowClient.create_run

    def create_after_another(*args: Any, **fields: Any) -> Any:
        monkeypatch.setattr(MlflowClient, "create_run", create_run)
        taken.append(found_or_made("hh", "8-2"))
        return create_run(*args, **fields)

    monkeypatch.setattr(MlflowClient, "create_run", create_after_another)
    taken.append(found_or_made("hh", "8-2"))
    return taken


@pytest.mark.usefixtures("database")
def test_tasks_of_one_run_share_a_parent_that_is_closed_as_the_run_ended(
    sent: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found("hh", "7-1") == []  # not even the experiment is there
    first = step("preprocess", tmp_path)
    step("rl", tmp_path, ValueError("the loss is no number at http://me:s3cr3t@host"))
    step("sft", tmp_path, ValueError("a first attempt"))
    step("sft", tmp_path)
    (parent,) = found("hh", "7-1")
    below = parent.client.search_runs([parent.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    assert sorted(run.info.run_name for run in below) == ["preprocess", "rl", "sft", "sft"]
    assert first in {run.info.run_id for run in below}
    orphan = parent.nested("reward", "killed")  # its process was killed
    reason = "the loss is no number at http://host"
    assert failures(parent) == {"rl": reason, "reward": "was stopped from outside, for want of memory or of time"}

    ending.report("hh", final("FAILED", "exit-handler-1 failed"))
    assert sent[0]["status"] == "failed"
    assert sorted(sent[0]["error"].split("; ")) == [
        "reward: was stopped from outside, for want of memory or of time",
        f"rl: {reason}",
    ]
    closed = parent.client.get_run(parent.run_id)
    assert (closed.info.status, closed.data.tags["plumbline.status"]) == ("FAILED", "failed")
    assert parent.client.get_run(orphan.run_id).info.status == "KILLED"

    # another run of the pipeline has a parent of its own, and two tasks that start at once share it
    mine, others = race(monkeypatch)
    assert mine.run_id == others.run_id != parent.run_id
    assert [run.run_id for run in found("hh", "8-2")] == [mine.run_id]
    monkeypatch.setenv("PLUMBLINE_PIPELINE_RUN", "8-2")
    ending.report("hh", final("SUCCEEDED"))
    assert parent.client.get_run(mine.run_id).info.status == "FINISHED"

    # an old Kubeflow says nothing: a failed task does; what its own plugin opened is left to it
    monkeypatch.setenv("PLUMBLINE_PIPELINE_RUN", "7-1")
    ending.report("hh", final("RUNNING"))
    assert sent[-1]["status"] == "failed"
    monkeypatch.setenv("MLFLOW_RUN_ID", first)
    ending.report("hh", final("CANCELLED"))
    assert sent[-1]["error"] == "Kubeflow gives no reason for the state CANCELLED"
    assert parent.client.get_run(parent.run_id).info.status == "FAILED"


def test_an_experiment_that_another_task_has_just_made_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.entities import Experiment
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS

    from components import mlflow_run

    class Client:
        made = False

        def get_experiment_by_name(self, name: str) -> Experiment | None:
            return Experiment("5", name, "there", "active") if self.made else None

        def create_experiment(self, name: str, location: str | None) -> str:
            self.made = True
            raise MlflowException("already exists", RESOURCE_ALREADY_EXISTS)

    assert mlflow_run._experiment_id(Client(), "hh", None) == "5"
