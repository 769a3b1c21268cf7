"""What MLflow cannot be told while a server fails is told when it answers, once, and training never waits.

The server is a stand-in in this process that keeps what MLflow's own keeps; tests/cluster/test_mlflow_server.py asks
the real one the same.
"""

import json
import logging
import math
import re
import tempfile
import threading
import time
import uuid
from base64 import b64decode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest

from components import mlflow_server, outbox, registry, tracking
from components.errors import InputError
from components.mlflow_run import MlflowRun, final_points
from components.mlflow_server import persist, reason, refused
from components.outbox import Outbox, Record
from components.termination import Terminated
from components.tracking import track
from pipeline import cli, ledger
from pipeline.ledger import Ledger, send_unsent
from pipeline.runs import RunFolder
from pipeline.summary import Result

PASSWORD = "pa55w0rd"


class StandIn:
    """The part of MLflow's REST interface that tracking uses, over HTTP, with the ways in which a server fails."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.batches: list[int] = []  # points of each log-batch that arrived
        self.answered: list[str] = []
        self.mode, self.only = "up", ""  # how it answers, and which endpoints alone do so
        self.password: str | None = None
        self.hanging, self.stop_hanging = 0, threading.Event()
        self.port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlparse(self.path)
                stand_in.answer(self, url.path, {key: values[0] for key, values in parse_qs(url.query).items()})

            def do_POST(self) -> None:
                stand_in.answer(self, self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_: Any) -> None: ...

        self.httpd = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.httpd.daemon_threads = True
        self.port = self.httpd.server_address[1]
        threading.Thread(target=self.httpd.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, path: str, body: dict[str, Any]) -> None:
        endpoint = path.removeprefix("/api/2.0/mlflow/")
        mode = self.mode if self.only in endpoint else "up"
        if mode == "hanging":
            self.hanging += 1
            self.stop_hanging.wait(120)
        status, found = (503, {}) if mode == "busy" else self.act(handler, endpoint, body)
        if mode == "deaf":  # it does what it is asked, and the answer gets lost
            return
        self.answered.append(endpoint)
        text = json.dumps(found).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    def act(self, handler: BaseHTTPRequestHandler, endpoint: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.password is not None:
            sent = b64decode(handler.headers.get("Authorization", "Basic ").removeprefix("Basic ")).decode()
            if sent != f"me:{self.password}":
                return 401, {"error_code": "UNAUTHENTICATED", "message": "who are you?"}
        act = getattr(self, endpoint.replace("/", "_").replace("-", "_"), None)
        return act(body) if act else (404, {"error_code": "ENDPOINT_NOT_FOUND", "message": endpoint})

    def experiments_get_by_name(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = body["experiment_name"]
        if name not in self.experiments:
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": name}
        return 200, {"experiment": {"experiment_id": self.experiments[name], "name": name}}

    def experiments_create(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.experiments[body["name"]] = str(len(self.experiments) + 1)
        return 200, {"experiment_id": self.experiments[body["name"]]}

    def runs_create(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        run_id = uuid.uuid4().hex  # MLflow's client remembers where a run keeps its files
        self.runs[run_id] = {
            "id": run_id, "experiment": body["experiment_id"], "name": body["run_name"], "status": "RUNNING",
            "points": set(), "tags": {tag["key"]: tag["value"] for tag in body["tags"]}, "params": {},
        }  # fmt: skip
        return 200, {"run": self.described(run_id)}

    def runs_get(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["run_id"] not in self.runs:
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}
        return 200, {"run": self.described(body["run_id"])}

    def runs_search(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        ((tag, value),) = re.findall(r"tags\.`(.+?)` = '(.*?)'", body["filter"])
        running = "RUNNING" in body["filter"]
        found = [
            self.described(run_id)
            for run_id, run in self.runs.items()
            if run["tags"].get(tag) == value and (run["status"] == "RUNNING" or not running)
        ]
        return 200, {"runs": found}

    def runs_log_batch(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        run, points = self.runs[body["run_id"]], body.get("metrics", [])
        if any("!" in point["key"] for point in points):
            return 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "a metric's name may not hold !"}
        run["params"] |= {param["key"]: param["value"] for param in body.get("params", [])}
        if points:
            self.batches.append(len(points))
        for point in points:
            run["points"].add((point["key"], int(point["step"]), int(point["timestamp"]), str(point["value"])))
        return 200, {}

    def runs_set_tag(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.runs[body["run_id"]]["tags"][body["key"]] = body["value"]
        return 200, {}

    def runs_update(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.runs[body["run_id"]]["status"] = body["status"]
        return 200, {"run_info": self.described(body["run_id"])["info"]}

    def described(self, run_id: str) -> dict[str, Any]:
        run = self.runs[run_id]
        info = {
            "run_id": run_id, "run_uuid": run_id, "experiment_id": run["experiment"], "run_name": run["name"],
            "status": run["status"], "artifact_uri": (self.store / run_id).as_uri(), "lifecycle_stage": "active",
        }  # fmt: skip
        return {"info": info, "data": {"tags": [{"key": k, "value": v} for k, v in run["tags"].items()]}}

    def named(self, name: str) -> dict[str, Any]:
        """The only run of this name."""
        (run,) = [run for run in self.runs.values() if run["name"] == name]
        return run


def updates(run: dict[str, Any], name: str = "loss") -> list[int]:
    """The updates at which a metric has points, one for each point."""
    return sorted(step for key, step, _, _ in run["points"] if key == name)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in that is the tracking address; all that waits is in a hurry."""
    for variable in ("MLFLOW_RUN_ID", "PLUMBLINE_PARENT_RUN", "PLUMBLINE_MLFLOW", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    for module, name, value in (
        (outbox, "EVERY_S", 0.05), (outbox, "LONGEST_S", 0.1), (outbox, "CLOSING_PAUSE_S", 0.05),
        (tracking, "START_S", 0.0), (tracking, "CLOSE_S", 60.0), (tracking, "KILLED_CLOSE_S", 1.0),
        (ledger, "START_S", 0.0), (ledger, "CLOSE_S", 60.0),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    stand_in = StandIn(tmp_path / "store")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stand_in.address)
    yield stand_in
    stand_in.stop_hanging.set()
    stand_in.stop()


def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    """Wait for what another thread brings about."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.02)


def return_after_the_end(server: StandIn) -> None:
    """The server comes back when no step of this process tries to reach it any more."""
    steps = {"mlflow sft", "mlflow rl", "mlflow evaluate"}
    until(lambda: not steps & {thread.name for thread in threading.enumerate()})
    server.start()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """For steps that end while the server is gone."""
    monkeypatch.setattr(tracking, "CLOSE_S", 0.3)
    monkeypatch.setattr(ledger, "CLOSE_S", 0.3)


def log(update: int, value: float = 1.0) -> None:
    tracking.log_metrics({"loss": value}, update)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said of MLflow."""
    texts = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [text for text in texts if "MLflow" in text]


def test_a_server_that_is_gone_for_a_while_gets_everything_once_after_one_warning(
    server: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with track("sft", {"lr": 1}, tmp_path / "task") as tracker:
        log(1)
        until(lambda: updates(server.named("sft")) == [1])
        server.stop()
        log(2)
        until(lambda: bool(warnings(caplog)))
        tracking.log_alert("kl_runaway", 2, "The KL is 31.")
        log(3)
        time.sleep(0.3)  # several attempts
        server.start()
        until(lambda: updates(server.named("sft")) == [1, 2, 3])
        tracker.finish({"loss": 0.5})
    run = server.named("sft")
    (warning,) = warnings(caplog)
    assert f"MLflow at {server.address} failed ([Errno 1" in warning and "sent when it answers" in warning
    assert updates(run) == [1, 2, 3, 3] and run["params"] == {"lr": "1"} and run["status"] == "FINISHED"
    assert run["tags"]["alert.kl_runaway"] == "at 2: The KL is 31."
    assert not (tmp_path / "task" / "unsent.json").exists()


def test_training_never_waits_for_the_server(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    report = tmp_path / "report"
    report.mkdir()
    with track("sft", {}, tmp_path / "task"):
        server.mode = "hanging"
        for update in range(50):
            log(update)
            tracking.log_alert("a", update, "b")
            tracking.log_artifacts(report)
            if update == 25:
                until(lambda: server.hanging == 1)
        assert server.hanging == 1  # the same request
        server.mode = "up"
        server.stop_hanging.set()
    assert updates(server.named("sft")) == list(range(50)) and server.named("sft")["status"] == "FINISHED"


def test_what_arrived_without_an_answer_is_sent_again_and_counts_once(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "START_S", 60.0)
    server.mode, server.only = "deaf", "create"

    def hear() -> None:
        until(lambda: bool(server.runs))
        server.mode = "up"

    threading.Thread(target=hear).start()
    with track("sft", {}, tmp_path) as tracker:
        assert list(server.experiments.values()) == ["1"]
        assert list(server.runs) == [tracker.run_id]
        server.mode, server.only = "deaf", "log-batch"
        log(1, 1.0 / 3)
        tracking.log_metrics({"loss": math.nan, "lr": 0.1}, 2)
        until(lambda: len(server.batches) >= 3)
        server.mode = "up"
        until(lambda: "runs/log-batch" in server.answered)
        assert updates(server.named("sft")) == [1, 2]
        server.mode, arrived = "deaf", len(server.batches)
        tracker.finish({"loss": 0.25})
        until(lambda: len(server.batches) >= arrived + 2)
        server.mode = "up"
    run = server.named("sft")
    assert updates(run) == [1, 2, 2] and updates(run, "lr") == [2]


def test_what_is_left_at_the_end_is_kept_and_the_command_of_the_warning_sends_it(
    server: StandIn, hurried: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    report, task = tmp_path / "report", tmp_path / "task"
    report.mkdir()
    (report / "report.html").write_text("<p>")
    with track("sft", {}, task) as tracker:
        log(1)
        until(lambda: updates(server.named("sft")) == [1])
        server.stop()
        log(2, math.nan)
        until(lambda: bool(warnings(caplog)))
        tracking.log_artifacts(report)
        tracker.finish({"loss": 0.25, "eval/loss": math.nan})
    message = warnings(caplog)[-1]
    assert f"{task / 'metrics.jsonl'}" in message and message.endswith(f"plumbline track {task}")
    assert "] Connection re" in message and len(warnings(caplog)) == 2
    assert server.named("sft")["status"] == "RUNNING"

    with pytest.raises(InputError, match=r"MLFLOW_TRACKING_URI is http://127.*Connection refused.*start the server\.$"):
        send_unsent(task, print)
    assert (task / "unsent.json").exists()

    return_after_the_end(server)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # the address is kept, the password is not
    said: list[str] = []
    send_unsent(task, said.append)
    run = server.named("sft")
    assert said == [f"{task}: run {tracker.run_id} has everything now"]
    assert updates(run) == [1, 2, 2] and updates(run, "eval/loss") == [2] and run["status"] == "FINISHED"
    assert (server.store / str(tracker.run_id) / "report" / "report.html").read_text() == "<p>"
    assert not (task / "unsent.json").exists()
    send_unsent(task, said.append)
    assert said[-1] == f"{task}: nothing is left to send"
    with pytest.raises(InputError, match=r"no such folder\. Give that of a run"):
        send_unsent(tmp_path / "elsewhere", print)


def test_a_step_by_itself_keeps_what_is_left_and_nothing_else(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def save(settings: Any, *, raw: Path) -> dict[str, float]:
        raw.mkdir()
        tracking.log_metrics({"loss": 1.0}, 1)
        if outage:
            server.stop()
        return {"demo/rows": 3.0}

    monkeypatch.setattr("components.demo.step.run", save)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for outage, patience in ((False, 60.0), (True, 0.3)):
        monkeypatch.setattr(tracking, "CLOSE_S", patience)
        cli.demo(tmp_path / f"raw-{outage}")
    (left,) = tmp_path.glob("plumbline-*")
    assert warnings(caplog)[-1].endswith(f"plumbline track {left}")
    return_after_the_end(server)
    send_unsent(left, print)
    assert [updates(run) for run in server.runs.values()] == [[1], [1]]


def test_what_is_no_record_of_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "unsent.json").write_text('{"address": 1}')
    with pytest.raises(InputError, match=r"unsent\.json: not what plumbline left there: "):
        send_unsent(tmp_path, print)


def test_a_report_that_is_gone_when_it_is_sent_is_told_and_the_rest_is_sent(
    server: StandIn, hurried: None, tmp_path: Path
) -> None:
    with track("sft", {}, tmp_path / "task"):
        server.stop()
        tracking.log_artifacts(tmp_path / "report")
    return_after_the_end(server)
    said: list[str] = []
    send_unsent(tmp_path / "task", said.append)
    assert len(said) == 2 and "refuses log_artifacts of sft" in said[0] and str(tmp_path / "report") in said[0]
    assert server.named("sft")["status"] == "FINISHED"


def test_a_step_that_starts_while_the_pipeline_s_server_is_gone_gets_its_run_later(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parent = MlflowRun.create("demo", "pipeline", "p")
    monkeypatch.setenv("PLUMBLINE_PARENT_RUN", parent.run_id)
    server.stop()
    with track("rl", {"lr": 2}, tmp_path / "rl") as tracker:
        assert tracker.run_id is None and "made when it answers" in warnings(caplog)[0]
        log(1)
        server.start()
        until(lambda: tracker.run_id is not None)
    run = server.named("rl")
    assert run["tags"]["mlflow.parentRunId"] == parent.run_id
    assert updates(run) == [1] and run["params"] == {"lr": "2"} and run["status"] == "FINISHED"

    server.stop()
    monkeypatch.setattr(tracking, "CLOSE_S", 0.3)
    with track("evaluate", {}, tmp_path / "evaluate"):
        log(7)
    return_after_the_end(server)
    send_unsent(tmp_path, print)
    assert updates(server.named("evaluate")) == [7]
    assert server.named("evaluate")["tags"]["mlflow.parentRunId"] == parent.run_id


def test_a_server_that_is_not_there_at_the_start_is_an_error_before_anything_runs(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.stop()
    message = (
        rf"^MLFLOW_TRACKING_URI is {server.address}, and MLflow there failed \(\[Errno 111\] Connection refused\)\. "
        r"Correct it or .*unset MLFLOW_TRACKING_URI or set PLUMBLINE_MLFLOW=optional\.$"
    )
    with pytest.raises(InputError, match=message), track("sft", {}, tmp_path):
        pytest.fail("the step ran")
    monkeypatch.setenv("RANK", "1")  # which tracks nothing and asks nobody
    with track("sft", {}, tmp_path):
        pass
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("PLUMBLINE_MLFLOW", "optional")
    with track("sft", {}, tmp_path) as tracker:
        log(1)
        assert tracker.run_id is None
    assert len(warnings(caplog)) == 1 and "nothing is tracked there" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    monkeypatch.setenv("PLUMBLINE_MLFLOW", "off")
    with pytest.raises(InputError, match="PLUMBLINE_MLFLOW is 'off'; accepted: required"), track("sft", {}, tmp_path):
        pass


def test_a_wrong_password_is_an_error_at_once_and_nobody_shows_it(
    server: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server.password = PASSWORD
    monkeypatch.setattr(tracking, "START_S", 60.0)
    began = time.monotonic()
    with caplog.at_level(logging.DEBUG):
        for user, password in (("me", "wr0ng"), (None, None)):
            if user:
                monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
                monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
            else:
                monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:wr0ng@127.0.0.1:{server.port}")
            with pytest.raises(InputError, match="UNAUTHENTICATED: who are you") as raised, track("sft", {}, tmp_path):
                pytest.fail("the step ran")
            assert "wr0ng" not in str(raised.value) and "MLFLOW_TRACKING_PASSWORD" in str(raised.value)
    assert time.monotonic() - began < 30 and not server.runs
    printed = capfd.readouterr()
    assert "wr0ng" not in caplog.text + printed.out + printed.err


@pytest.mark.parametrize("in_the_address", [True, False])
def test_no_password_is_logged_printed_tracked_or_kept(
    in_the_address: bool,
    server: StandIn,
    hurried: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server.password = PASSWORD
    if in_the_address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}@127.0.0.1:{server.port}")
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    said: list[str] = []
    with caplog.at_level(logging.DEBUG):
        with track("sft", {}, tmp_path / "sft"):  # ends well: MLflow itself would print where to look
            log(1)
        with track("rl", {}, tmp_path / "rl"):
            log(1)
            server.stop()
        return_after_the_end(server)
        kept = (tmp_path / "rl" / "unsent.json").read_text()
        server.mode = "busy"
        with pytest.raises(InputError) as raised:
            send_unsent(tmp_path, said.append)
        server.mode = "up"
        send_unsent(tmp_path, said.append)
    assert server.named("sft")["status"] == server.named("rl")["status"] == "FINISHED"
    printed = capfd.readouterr()
    everything = (kept, str(raised.value), *said, caplog.text, printed.out, printed.err, repr(server.runs))
    assert not [text for text in everything if PASSWORD in text]
    assert "127.0.0.1" in caplog.text and f"http://127.0.0.1:{server.port}" in kept


def test_what_mlflow_will_never_accept_is_told_once_and_what_follows_is_sent(
    server: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with track("sft", {}, tmp_path):
        for update in range(3):
            tracking.log_metrics({"loss!": 1.0}, update)
            sent = len(warnings(caplog))
            until(lambda sent=sent: bool(warnings(caplog)) or sent > 0)
        time.sleep(0.2)
        log(5)
        tracking.log_alert("a", 1, "b")
    (warning,) = warnings(caplog)
    assert "refuses log_metrics of sft: INVALID_PARAMETER_VALUE: a metric's name may not hold !" in warning
    assert updates(server.named("sft")) == [5] and server.named("sft")["tags"]["alert.a"] == "at 1: b"
    assert server.named("sft")["status"] == "FINISHED" and not (tmp_path / "unsent.json").exists()


def test_a_kill_during_the_last_sending_leaves_the_record(
    server: StandIn, hurried: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: threading.Thread, timeout: float | None = None) -> None:
        raise Terminated

    def step(patch: pytest.MonkeyPatch) -> None:
        with track("sft", {}, tmp_path):
            server.stop()
            log(1)
            patch.setattr(threading.Thread, "join", killed)

    with monkeypatch.context() as patch, pytest.raises(Terminated):
        step(patch)
    return_after_the_end(server)
    send_unsent(tmp_path, print)
    assert updates(server.named("sft")) == [1]


def test_a_server_that_hangs_at_the_end_is_not_waited_for_longer_than_said(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    monkeypatch.setattr(tracking, "CLOSE_S", 0.4)
    with track("sft", {}, tmp_path):
        server.mode = "hanging"
        log(1)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert "lacks numbers of this step (no answer within 0 seconds)" in caplog.text
    server.stop_hanging.set()


class Kept(MlflowRun):
    """A run that keeps the points it is told."""

    def __init__(self) -> None:
        super().__init__(None, "r", "e")
        self.batches: list[list[Any]] = []

    def log_metrics(self, points: Any) -> None:
        self.batches.append(list(points))


def test_metrics_are_read_in_batches_and_a_line_that_is_being_written_waits(tmp_path: Path) -> None:
    run = Kept()
    kept = Outbox(tmp_path, Record(address="", name="rl", start="s"), run)
    kept.deliver()  # before the first metrics
    row = {"update": 1, "time": 2.5, **{f"m{index}": index for index in range(600)}}
    text = "".join(json.dumps({**row, "update": update}) + "\n" for update in range(5))
    (tmp_path / "metrics.jsonl").write_text(text[:-9])
    kept.deliver()
    assert [len(batch) for batch in run.batches] == [1200, 1200]
    (tmp_path / "metrics.jsonl").write_text(text)
    kept.deliver()
    kept.deliver()
    assert [len(batch) for batch in run.batches] == [1200, 1200, 600]
    assert run.batches[2][7] == ("m7", 7, 2500, 4)


def test_a_pipeline_needs_the_server_it_was_given_unless_told_otherwise(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.stop()
    said: list[str] = []
    folder = RunFolder.create(tmp_path)
    with pytest.raises(InputError, match=rf"MLFLOW_TRACKING_URI is {server.address}.*Connection refused"):
        Ledger(tmp_path, said.append).open("demo", folder, {})
    monkeypatch.setenv("PLUMBLINE_MLFLOW", "optional")
    books = Ledger(tmp_path, said.append)
    books.open("demo", folder, {})
    books.cached(Result("sft", "cached"))
    books.close(folder, "succeeded")
    assert len(said) == 1 and "this run is not tracked there" in said[0]
    assert books.environment() == {"MLFLOW_TRACKING_URI": ""}  # no step asks that server again


def test_a_pipeline_s_books_are_kept_through_an_outage(server: StandIn, hurried: None, tmp_path: Path) -> None:
    said: list[str] = []
    folder, books = RunFolder.create(tmp_path), Ledger(tmp_path, said.append)
    (folder.path / "settings.yaml").write_text("a: 1")
    folder.summary.write_text("{}")
    books.open("demo", folder, {"a": 1})
    server.mode, server.only = "deaf", "runs/create"
    books.cached(Result("sft", "cached", metrics={"loss": 1.0}))
    until(lambda: bool(said))
    server.mode = "up"
    until(lambda: [run["status"] for run in server.runs.values()] == ["RUNNING", "FINISHED"])
    assert updates(server.named("sft")) == [0] and server.named("sft")["tags"]["plumbline.cached"] == "true"

    server.stop()
    step = tmp_path / "elsewhere" / "rl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMBLINE_PARENT_RUN", books.environment()["PLUMBLINE_PARENT_RUN"])
        with track("rl", {}, step):
            log(4)
    folder.link("rl", step)
    books.close(folder, "succeeded")
    assert said[-1].startswith(f"warning: MLflow at {server.address} lacks numbers of rl, {folder.run_id}")
    assert said[-1].endswith(f"plumbline track {folder.path}")
    return_after_the_end(server)
    send_unsent(folder.path, said.append)
    parent = server.named(folder.run_id)
    assert (parent["status"], parent["tags"]["plumbline.status"]) == ("FINISHED", "succeeded")
    assert server.named("rl")["status"] == "FINISHED" and updates(server.named("rl")) == [4]
    assert [path.name for path in sorted((server.store / parent["id"]).iterdir())] == ["settings.yaml", "summary.json"]


def test_a_pipeline_sends_at_its_end_what_a_step_could_not(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    folder, books = RunFolder.create(tmp_path), Ledger(tmp_path, said.append)
    (folder.path / "settings.yaml").write_text("a: 1")
    folder.summary.write_text("{}")
    books.open("demo", folder, {})
    monkeypatch.setenv("PLUMBLINE_PARENT_RUN", books.environment()["PLUMBLINE_PARENT_RUN"])
    monkeypatch.setattr(tracking, "CLOSE_S", 0.3)
    with track("rl", {}, folder.path / "rl"):
        server.stop()
        log(4)
    return_after_the_end(server)
    assert (folder.path / "rl" / "unsent.json").exists()
    books.close(folder, "failed")
    assert said == [] and updates(server.named("rl")) == [4]
    assert server.named("rl")["status"] == "FINISHED" and server.named(folder.run_id)["status"] == "FAILED"


def test_what_may_pass_is_tried_again_and_what_cannot_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    tries: list[BaseException | None] = []

    def action(*outcomes: BaseException | None) -> Callable[[], str]:
        waiting = list(outcomes)

        def act() -> str:
            tries.append(outcome := waiting.pop(0))
            if outcome is not None:
                raise outcome
            return "done"

        return act

    from mlflow.exceptions import RestException

    busy = RestException({"error_code": "TEMPORARILY_UNAVAILABLE"})
    denied = RestException({"error_code": "PERMISSION_DENIED"})
    assert persist(action(ConnectionError(), busy, TimeoutError(), None), 60) == "done" and len(tries) == 4
    for error in (denied, InputError("x"), FileNotFoundError("f"), KeyError("k")):
        tries.clear()
        with pytest.raises(type(error)):
            persist(action(error, None), 60)
        assert len(tries) == 1
    tries.clear()
    with pytest.raises(ConnectionError):
        persist(action(ConnectionError(), None), 0)
    assert len(tries) == 1
    assert refused(RestException({"error_code": "INVALID_PARAMETER_VALUE"}))
    assert refused(FileNotFoundError()) and refused(KeyError())
    assert not refused(denied) and not refused(busy) and not refused(ConnectionError())


def test_a_reason_is_the_network_s_own_and_has_no_password() -> None:
    outer = RuntimeError("API request failed with a page of text")
    outer.__context__ = TimeoutError(f"no answer from http://me:{PASSWORD}@host")  # as MLflow raises it
    assert reason(outer) == "no answer from http://host"
    assert reason(RuntimeError(f"http://me:{PASSWORD}@host says no")) == "http://host says no"


def test_final_numbers_are_later_than_the_last_ones_of_training() -> None:
    now = time.time() + 10
    assert final_points({"loss": 1}, 3, now) == [("loss", 1.0, round(now * 1000) + 1, 3)]
    ((_, _, at, update),) = final_points({"loss": 1})
    assert update == 0 and abs(at / 1000 - time.time()) < 60


def test_the_registry_waits_for_its_server_a_while(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def versions(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        asked.append(body["filter"])
        return (503, {}) if len(asked) < 3 else (200, {})

    monkeypatch.setattr(server, "model_versions_search", versions, raising=False)
    assert registry.promote("tiny", "d") is None  # no such version; it was asked until it answered
    assert len(asked) == 3


def test_the_bounds_of_a_request_are_ours_unless_a_person_set_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://nowhere")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    mlflow_server.client()
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    assert (MLFLOW_HTTP_REQUEST_TIMEOUT.get(), MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()) == (77, 0)
