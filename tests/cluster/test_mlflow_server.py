"""Tracking and the registry against a real `mlflow server` over HTTP: what it keeps, outages, users and passwords."""

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl
from kfp.dsl import Metrics, Model, Output

from components import outbox, tracking
from components.component import component
from components.errors import InputError
from components.mlflow_run import MlflowRun, final_points
from components.mlflow_server import client
from components.registry import promote, register
from components.tracking import track
from pipeline.local import Plan
from pipeline.local import run as run_locally
from pipeline.screen import Screen

pytestmark = pytest.mark.tried("MLflow: runs, registry, users, outages", against="mlflow server, real")

ADMIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "Adm1nistration!"}
READER = {"MLFLOW_TRACKING_USERNAME": "reader", "MLFLOW_TRACKING_PASSWORD": "r3ader-of-runs!"}
PATIENCE_S = 300.0
"""With a server that starts or answers on a busy machine."""


class Server:
    """An `mlflow server` process with its database and artifacts in a folder."""

    def __init__(self, folder: Path, *options: str, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.environment = folder, environment
        self.address = f"http://127.0.0.1:{self.port}"
        self.command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
            "--artifacts-destination", str(folder / "artifacts"), *options,
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env={**os.environ, **self.environment}, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        until(self._is_up)

    def stop(self) -> None:
        """Kill it, with its workers."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _is_up(self) -> bool:
        assert self.process is not None and self.process.poll() is None, (self.folder / "log.txt").read_text()
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def until(condition: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
    """Wait for what another thread or process brings about."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The tracking address."""
    for variable in ("MLFLOW_RUN_ID", "PLUMBLINE_PARENT_RUN", "PLUMBLINE_MLFLOW", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(round(PATIENCE_S)))
    monkeypatch.setattr(outbox, "EVERY_S", 0.2)
    monkeypatch.setattr(outbox, "LONGEST_S", 0.5)
    monkeypatch.setattr(tracking, "CLOSE_S", PATIENCE_S)
    return running


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that asks for a user and a password."""
    server = Server(
        tmp_path_factory.mktemp("guarded"),
        "--app-name",
        "basic-auth",
        MLFLOW_FLASK_SERVER_SECRET_KEY="a key for forms",
        MLFLOW_AUTH_ADMIN_PASSWORD=ADMIN["MLFLOW_TRACKING_PASSWORD"],
    )
    server.start()
    yield server
    server.stop()


def points(run_id: str, name: str) -> list[tuple[int, float]]:
    """Update and value of every point that the server has of a metric."""
    return sorted((point.step, point.value) for point in client().get_metric_history(run_id, name))


def test_a_step_s_run_has_its_params_numbers_tags_and_report(server: Server, tmp_path: Path) -> None:
    report = tmp_path / "report"
    (report / "pictures").mkdir(parents=True)
    (report / "report.html").write_text("<p>")
    (report / "pictures" / "loss.svg").write_text("<svg/>")
    parent = MlflowRun.create("nested", "pipeline", "p1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMBLINE_PARENT_RUN", parent.run_id)
        with track("sft", {"training": {"epochs": 3}, "text": "x" * 900}, tmp_path / "task") as tracker:
            for update in range(2500):
                tracking.log_metrics({"loss/train": 1 / (update + 1)}, update)
            tracking.log_metrics({"odd": math.nan, "up": math.inf}, 7)
            tracking.log_alert("kl_runaway", 7, "The KL is 31.")
            tracking.log_artifacts(report)
            tracker.finish({"loss/train": 0.5, "eval/loss": 3.0})
    parent.end("FINISHED")
    assert tracker.run_id is not None
    run = client().get_run(tracker.run_id)
    assert (run.info.run_name, run.info.status) == ("sft", "FINISHED")
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.data.tags["alert.kl_runaway"] == "at 7: The KL is 31."
    assert run.data.params == {"training.epochs": "3", "text": "x" * 500}
    assert (run.data.metrics["loss/train"], run.data.metrics["eval/loss"]) == (0.5, 3.0)
    assert len(points(tracker.run_id, "loss/train")) == 2501
    assert math.isnan(points(tracker.run_id, "odd")[0][1]) and points(tracker.run_id, "up")[0][1] > 1e300
    files = {file.path for file in client().list_artifacts(tracker.run_id, "report")}
    assert files == {"report/report.html", "report/pictures"}
    assert client().get_run(parent.run_id).info.status == "FINISHED"


def test_what_is_told_twice_is_kept_once(server: Server) -> None:
    """What the resending after a lost answer relies on."""
    run, again = (MlflowRun.create("twice", "pipeline", "same start") for _ in range(2))
    assert run.run_id == again.run_id
    told = [*final_points({"a": 1 / 3, "b": math.nan, "c": math.inf}, 4), ("a", 0.5, 1000, 4), ("a", 1 / 3, 1000, 4)]
    for _ in range(3):
        run.log_params({"lr": 0.1})
        run.log_metrics(told)
        run.log_metrics([("new", float(len(told)), 1000, 1), *told])  # some of a batch are there, some not
        run.log_cached("sft", "same start/sft", told)
        run.set_tag("t", "v")
        run.end("FINISHED")
    assert points(run.run_id, "a") == [(4, 1 / 3), (4, 1 / 3), (4, 0.5)]  # two at the same update, not the same time
    assert len(points(run.run_id, "b")) == len(points(run.run_id, "c")) == len(points(run.run_id, "new")) == 1
    (child,) = client().search_runs([run.experiment_id], f"tags.`mlflow.parentRunId` = '{run.run_id}'")
    assert child.data.tags["plumbline.cached"] == "true" and child.info.status == "FINISHED"
    assert len(points(child.info.run_id, "a")) == 3


def test_a_server_that_is_killed_and_started_again_has_everything_once(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), track("rl", {"lr": 1}, tmp_path) as tracker:
        run_id = str(tracker.run_id)
        tracking.log_metrics({"loss": 0.0}, 0)
        until(lambda: points(run_id, "loss") == [(0, 0.0)])
        server.stop()
        for update in range(1, 1500):
            tracking.log_metrics({"loss": float(update), "lr": 0.1}, update)
        until(lambda: "sent when it answers" in caplog.text)
        server.start()
        until(lambda: "answers again" in caplog.text)
        assert points(run_id, "loss") == [(update, float(update)) for update in range(1500)]
        tracking.log_metrics({"loss": -1.0}, 1500)
    assert points(run_id, "loss")[-1] == (1500, -1.0) and len(points(run_id, "lr")) == 1499
    assert client().get_run(run_id).info.status == "FINISHED"
    assert caplog.text.count("sent when it answers") == 1


def plumbline(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_server_that_is_gone_at_the_end_is_told_by_command_later(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "CLOSE_S", 2.0)
    with track("rl", {}, tmp_path) as tracker:
        server.stop()
        tracking.log_metrics({"loss": 0.25}, 3)
        tracker.finish({"loss": 0.125, "odd": math.nan})
    assert caplog.messages[-1].endswith(f"plumbline track {tmp_path}")
    failed = plumbline("track", str(tmp_path))
    assert failed.returncode == 2 and failed.stderr.startswith("error: MLFLOW_TRACKING_URI is http://127.0.0.1")
    server.start()
    done = plumbline("track", str(tmp_path))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}: run {tracker.run_id} has everything now\n"), done.stderr
    assert points(str(tracker.run_id), "loss") == [(3, 0.125), (3, 0.25)]
    assert client().get_run(tracker.run_id).info.status == "FINISHED"


@component
def gather(raw: Output[Model], metrics: Output[Metrics]) -> None:
    from components.launch import launch

    launch("demo", {"seed": 3}, metrics, "demo", raw=raw)


def test_a_pipeline_s_run_holds_those_of_its_steps_cached_ones_too(server: Server, tmp_path: Path) -> None:
    @dsl.pipeline(name="tracked")
    def pipeline() -> None:
        gather().set_display_name("demo")

    for _ in range(2):
        assert run_locally(Plan(pipeline, "tracked", ("demo",), {"seed": 3}), tmp_path / "runs", Screen()) == 0
    experiment = client().get_experiment_by_name("tracked").experiment_id
    runs = client().search_runs([experiment], order_by=["attributes.start_time ASC"])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(runs) == 4 and len(parents) == 2
    assert {run.info.status for run in runs} == {"FINISHED"}
    names = sorted(path.name for path in (tmp_path / "runs").iterdir() if path.name[0] == "2")
    assert [run.info.run_name for run in parents] == names
    for parent, cached in zip(parents, (None, "true"), strict=True):
        (step,) = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert step.info.run_name == "demo" and step.data.metrics and step.data.tags.get("plumbline.cached") == cached
        assert parent.data.params == {"seed": "3"} and parent.data.tags["plumbline.status"] == "succeeded"
        files = {file.path for file in client().list_artifacts(parent.info.run_id)}
        assert files == {"settings.yaml", "summary.json"}


def test_the_registry_has_a_version_per_digest_aliases_and_a_message_for_what_it_cannot_read(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = MlflowRun.create("registry", "pipeline", "r1")
    monkeypatch.setenv("PLUMBLINE_PARENT_RUN", run.run_id)
    first, second = (register("tiny", f"gs://models/tiny/{digest}", digest) for digest in ("aaa", "bbb"))
    assert (first, second) == ("1", "2") and register("tiny", "gs://models/tiny/bbb", "bbb") == "2"
    assert promote("tiny", "aaa") == "1" and promote("tiny", "ccc") is None
    candidate = client().get_model_version_by_alias("tiny", "candidate")
    assert (candidate.version, candidate.source, candidate.run_id) == ("2", "gs://models/tiny/bbb", run.run_id)
    assert client().get_model_version_by_alias("tiny", "champion").tags == {"digest": "aaa"}
    with pytest.raises(InputError, match=rf"registry at {server.address} does not accept {tmp_path}.*gs:// address"):
        register("tiny", str(tmp_path), "ddd")


def answer(address: str, path: str, body: dict[str, Any], login: dict[str, str]) -> None:
    """Ask the server for something that tracking never asks for."""
    user, password = login["MLFLOW_TRACKING_USERNAME"], login["MLFLOW_TRACKING_PASSWORD"]
    keys = urllib.request.HTTPPasswordMgrWithPriorAuth()
    keys.add_password(None, address, user, password, is_authenticated=True)
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(keys)).open(request) as found:
        assert found.status == 200


def test_a_server_with_users_takes_the_right_password_and_no_other_and_none_is_shown(
    guarded: Server,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", guarded.address)
    right, wrong = ADMIN["MLFLOW_TRACKING_PASSWORD"], "not the password"
    shown: list[str] = []
    with caplog.at_level(logging.DEBUG):
        for login in ({}, {**ADMIN, "MLFLOW_TRACKING_PASSWORD": wrong}):
            with monkeypatch.context() as patch:
                for name, value in login.items():
                    patch.setenv(name, value)
                with pytest.raises(InputError, match="not authenticated") as raised, track("sft", {}, tmp_path):
                    pytest.fail("the step ran")
            shown.append(str(raised.value))
        report = tmp_path / "report"
        report.mkdir()
        (report / "report.html").write_text("<p>")
        for number, in_address in enumerate((False, True)):
            with monkeypatch.context() as patch:
                if in_address:
                    user = f"{ADMIN['MLFLOW_TRACKING_USERNAME']}:{right}"
                    patch.setenv("MLFLOW_TRACKING_URI", guarded.address.replace("//", f"//{user}@"))
                else:
                    for name, value in ADMIN.items():
                        patch.setenv(name, value)
                with track("sft", {"lr": 1}, tmp_path / "task") as tracker:
                    tracking.log_metrics({"loss": 0.5}, 1)
                    tracking.log_artifacts(report)
                assert register(f"model-{number}", "gs://models/a", "a") == "1"
                assert promote(f"model-{number}", "a") == "1"
                run = client().get_run(tracker.run_id)
                assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 0.5})
                assert [file.path for file in client().list_artifacts(run.info.run_id)] == ["report"]
                shown.append(repr(run.to_dictionary()))
    printed = capfd.readouterr()
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    for text in (*shown, caplog.text, printed.out, printed.err, written):
        assert right not in text and wrong not in text
    assert "5" in written


def test_a_user_who_may_only_read_is_an_error_before_anything_runs(
    guarded: Server, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", guarded.address)
    with monkeypatch.context() as patch:
        for name, value in ADMIN.items():
            patch.setenv(name, value)
        MlflowRun.create("theirs", "pipeline", "t1")
    login = {"username": READER["MLFLOW_TRACKING_USERNAME"], "password": READER["MLFLOW_TRACKING_PASSWORD"]}
    answer(guarded.address, "/api/2.0/mlflow/users/create", login, ADMIN)
    for name, value in {**READER, "MLFLOW_EXPERIMENT_NAME": "theirs"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="Permission denied") as raised, track("sft", {}, tmp_path):
        pytest.fail("the step ran")
    assert READER["MLFLOW_TRACKING_PASSWORD"] not in str(raised.value)
