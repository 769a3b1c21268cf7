"""`plumbline run`'s engine on small pipelines of trivial components, run by kfp.local as real ones are."""

import io
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl
from kfp.dsl import Input, Metrics, Model, Output

from components.component import component
from pipeline import ledger, local
from pipeline.local import Plan
from pipeline.screen import Screen
from pipeline.summary import read_alerts


@component
def grow(settings: dict, model: Output[Model], metrics: Output[Metrics], fingerprint: str = "") -> None:
    import json
    from pathlib import Path

    print("progress grow 1/2 loss=0.5", flush=True)
    Path(model.path).mkdir(parents=True)
    (Path(model.path) / "weights").write_text(str(settings["size"]))
    Path(metrics.path).write_text(json.dumps({"grow/size": settings["size"]}))


@component
def judge(model: Input[Model], minimum: float, metrics: Output[Metrics]) -> bool:
    import json
    from pathlib import Path

    passed = float((Path(model.path) / "weights").read_text()) >= minimum
    Path(metrics.path).write_text(json.dumps({"gate/passed": float(passed)}))
    return passed


@component
def publish(model: Input[Model], release: Output[Model], metrics: Output[Metrics]) -> None:
    import json
    from pathlib import Path

    Path(release.path).mkdir(parents=True)
    (Path(release.path) / "release.json").write_text(json.dumps({"digest": "abc", "uri": "gs://there"}))
    Path(metrics.path).write_text("{}")


@component
def stumble(model: Input[Model], task: str) -> None:
    raise RuntimeError("the loss is not a number")


@component
def mistake(model: Input[Model], task: str, raw: Output[Model], metrics: Output[Metrics]) -> None:
    from components.launch import launch

    launch("demo", {"num_pairs": "many"}, metrics, task, raw=raw)


@component
def alarm(end_well: bool, model: Output[Model], metrics: Output[Metrics]) -> None:
    from pathlib import Path

    from components import tracking

    folder = Path(metrics.path).parent
    Path(model.path).mkdir(parents=True)
    (folder / "report").mkdir()
    (folder / "report" / "report.html").write_text("<p>")
    with tracking.track("rl", {}, folder):
        tracking.log_alert("kl_runaway", 12, "The KL is 31.")
    assert end_well
    Path(metrics.path).write_text("{}")


@component
def wait(model: Input[Model], task: str) -> None:
    import time
    from pathlib import Path

    (Path(model.path) / "waiting").write_text("")
    time.sleep(60)


@component
def train(model: Input[Model], task: str, raw: Output[Model], metrics: Output[Metrics]) -> None:
    import os
    from pathlib import Path

    import components.demo.step
    from components import termination
    from components.launch import launch

    checkpoint = Path(model.path).parent / "checkpoint"

    def learn(settings: object, *, raw: Path) -> dict[str, float]:
        with termination.watch() as watch:
            if not checkpoint.exists():
                (Path(model.path) / "waiting").write_text(str(os.getpid()))
                while not watch.requested:
                    pass
                checkpoint.write_text("")
            watch.check()
        return {}

    components.demo.step.run = learn
    launch("demo", {}, metrics, task, raw=raw)


@component
def loiter(model: Input[Model], task: str) -> None:
    import os
    import time
    from pathlib import Path

    (Path(model.path) / "waiting").write_text(str(os.getpid()))
    time.sleep(60)


@component
def tell(model: Input[Model], task: str) -> None:
    import os
    from pathlib import Path

    (Path(model.path) / "told").write_text(os.environ["PLUMBLINE_CHECKPOINTS"])


def gated(size: float = 2.0, minimum: float = 1.0, fingerprint: str = "", **more: str) -> Plan:
    @dsl.pipeline(name="gated")
    def pipeline() -> None:
        model = grow(settings={"size": size, **more}, fingerprint=fingerprint).outputs["model"]
        judged = judge(model=model, minimum=minimum).set_display_name("evaluate")
        with dsl.If(judged.outputs["Output"] == True):  # noqa: E712
            publish(model=model).set_display_name("upload")

    return Plan(pipeline, "gated", ("grow", "evaluate", "upload"), {"size": size})


def ending_in(last: Any) -> Plan:
    """The last component twice: kfp would go on with the second when the first fails, a run must not."""

    @dsl.pipeline(name="ending")
    def pipeline() -> None:
        model = grow(settings={"size": 1}).outputs["model"]
        for task in ("first", "second"):
            last(model=model, task=task).set_display_name(task)

    return Plan(pipeline, "ending", ("grow", "first", "second"), {})


def alarming(end_well: bool) -> Plan:
    @dsl.pipeline(name="alarming")
    def pipeline() -> None:
        alarm(end_well=end_well).set_display_name("rl")

    return Plan(pipeline, "alarming", ("rl",), {})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a plan: its exit code, its summary, what was printed to stdout and to stderr."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(local, "Ledger", _NoLedger)

    def go(plan: Plan) -> tuple[int, dict[str, Any], str, str]:
        stream = io.StringIO()
        code = local.run(plan, tmp_path / "runs", Screen(stream))
        summary = json.loads((tmp_path / "runs" / "latest" / "summary.json").read_text())
        return code, summary, stream.getvalue(), capsys.readouterr().err

    return go


class _NoLedger:
    """Tracking is tested by itself; opening a database takes seconds."""

    address = ""
    run = None

    def __init__(self, *_: Any) -> None: ...
    def open(self, *_: Any) -> None: ...
    def cached(self, *_: Any) -> None: ...
    def close(self, *_: Any) -> None: ...
    def place(self) -> None: ...
    def environment(self) -> dict[str, str]:
        return {}


def statuses(summary: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["status"] for step in summary["steps"]}


def test_a_run_that_succeeds_leaves_summary_log_links_and_no_trace_in_kfp(run: Any, tmp_path: Path) -> None:
    code, summary, printed, _ = run(gated())
    folder = tmp_path / "runs" / summary["run_id"]
    assert code == 0
    assert summary["status"] == "succeeded"
    assert statuses(summary) == {"grow": "succeeded", "evaluate": "succeeded", "upload": "succeeded"}
    assert summary["steps"][0]["metrics"] == {"grow/size": 2.0}
    assert (summary["model_dir"], summary["model_digest"], summary["served_digest"]) == ("gs://there", "abc", None)
    assert (folder / "grow" / "model" / "weights").read_text() == "2.0"
    assert "progress grow 1/2" in (folder / "log.txt").read_text()
    assert printed.count("grow       started") == 1
    assert "progress grow" not in printed
    assert (tmp_path / "runs" / "latest").resolve() == folder
    from kfp.local import config

    assert config.LocalExecutionConfig.instance is None


def test_a_webhook_is_told_how_a_run_ended_and_its_troubles_fail_nothing(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[dict[str, str]] = []
    monkeypatch.setattr(local.webhook, "send", lambda message: messages.append(message) or "the webhook is deaf")
    code, summary, printed, _ = run(gated())
    assert code == 0 and "warning: the webhook is deaf" in printed
    assert messages == [{"run": summary["run_id"], "status": "succeeded", "error": "", "pipeline": "gated"}]
    code, summary, *_ = run(ending_in(stumble))
    assert code == 1
    assert messages[1]["run"] == summary["run_id"] and messages[1]["status"] == "failed"
    assert re.match("step (first|second) failed: ", messages[1]["error"])


def test_a_second_run_is_all_cached_even_when_the_first_run_was_deleted(run: Any, tmp_path: Path) -> None:
    import shutil

    _, first, *_ = run(gated())
    shutil.rmtree(tmp_path / "runs" / first["run_id"])
    code, summary, printed, _ = run(gated())
    assert code == 0
    assert set(statuses(summary).values()) == {"cached"}
    assert summary["steps"][0]["metrics"] == {"grow/size": 2.0}
    assert summary["model_digest"] == "abc"
    assert "started" not in printed


def test_other_settings_code_or_inputs_run_again_with_what_follows_and_nothing_else(run: Any) -> None:
    run(gated())
    assert statuses(run(gated(minimum=1.5))[1]) == {
        "grow": "cached", "evaluate": "succeeded", "upload": "cached",
    }  # fmt: skip
    assert set(statuses(run(gated(fingerprint="new"))[1]).values()) == {"succeeded"}
    assert set(statuses(run(gated(rerun="a word"))[1]).values()) == {"succeeded"}  # as `plumbline rerun` does


def test_a_rejected_candidate_is_a_successful_run_that_ships_nothing(run: Any) -> None:
    code, summary, *_ = run(gated(minimum=5.0))
    assert code == 0
    assert summary["status"] == "rejected"
    assert statuses(summary)["upload"] == "skipped"
    assert summary["promoted"] is False


def test_a_failing_step_ends_the_run_with_its_own_error_last(run: Any) -> None:
    code, summary, _, complaint = run(ending_in(stumble))
    assert code == 1
    assert summary["status"] == "failed"
    assert sorted(statuses(summary).values()) == ["failed", "skipped", "succeeded"]
    failed = next(name for name, status in statuses(summary).items() if status == "failed")
    assert complaint.splitlines()[-1] == f"error: step {failed} failed: its process ended with code 1"
    assert "RuntimeError: the loss is not a number" in complaint
    assert statuses(run(ending_in(stumble))[1])["grow"] == "cached"


def test_a_tracking_server_that_is_not_there_is_one_message_before_the_first_step(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "Ledger", ledger.Ledger)
    monkeypatch.setattr(ledger, "START_S", 0.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:1")
    code, summary, _, complaint = run(gated())
    assert code == 2
    assert set(statuses(summary).values()) == {"skipped"}
    assert complaint.startswith("error: MLFLOW_TRACKING_URI is http://127.0.0.1:1, and MLflow there failed (")
    assert len(complaint.splitlines()) == 1


def test_a_mistake_of_a_person_is_one_message_and_exit_code_2(run: Any, tmp_path: Path) -> None:
    code, summary, _, complaint = run(ending_in(mistake))
    assert code == 2
    assert summary["status"] == "failed"
    failed = next(name for name, status in statuses(summary).items() if status == "failed")
    assert complaint == f"error: {failed}.num_pairs is 'many'; accepted: a valid integer.\n"
    record = json.loads((tmp_path / "runs" / "latest" / "steps" / f"{failed}.json").read_text())
    assert (record["status"], record["kind"]) == ("failed", "input")


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C is heard, also where the tests were started in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(
    ("number", "expected", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped")]
)
def test_a_signal_ends_the_step_and_still_writes_the_summary(
    number: signal.Signals, expected: int, word: str, run: Any, tmp_path: Path
) -> None:
    def interrupt() -> None:
        while not list(tmp_path.glob("runs/.artifacts/*/grow/model/waiting")):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    started = time.monotonic()
    code, summary, _, complaint = run(ending_in(wait))
    assert time.monotonic() - started < 30
    assert code == expected
    assert summary["status"] == "failed"
    assert sorted(statuses(summary).values()) == ["failed", "skipped", "succeeded"]
    failed = next(name for name, status in statuses(summary).items() if status == "failed")
    assert complaint.count("\n") == 1
    assert complaint.startswith(word) and f"continues from step {failed}" in complaint


def test_a_step_that_sigterm_stops_keeps_a_checkpoint_and_the_same_command_continues(run: Any, tmp_path: Path) -> None:
    def stop() -> None:
        while not list(tmp_path.glob("runs/.artifacts/*/grow/model/waiting")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    code, summary, _, complaint = run(ending_in(train))
    assert code == 143 and complaint.startswith("stopped: the same command continues")
    failed = next(name for name, status in statuses(summary).items() if status == "failed")
    record = json.loads((tmp_path / "runs" / "latest" / "steps" / f"{failed}.json").read_text())
    assert record["status"] == "stopped" and record["error"].startswith("stopped by SIGTERM; ")
    log = (tmp_path / "runs" / "latest" / "log.txt").read_text()
    assert f"{failed}: stopped by SIGTERM; the same command continues" in log  # what it said at the end is read too
    assert run(ending_in(train))[0] == 0


@pytest.mark.parametrize("last", [train, loiter], ids=["after its checkpoint", "before there was one"])
def test_a_step_that_is_stopped_from_elsewhere_stops_the_run(last: Any, run: Any, tmp_path: Path) -> None:
    def stop() -> None:
        while not (found := list(tmp_path.glob("runs/.artifacts/*/grow/model/waiting"))) or not found[0].read_text():
            time.sleep(0.05)
        os.kill(int(found[0].read_text()), signal.SIGTERM)

    threading.Thread(target=stop).start()
    code, summary, _, complaint = run(ending_in(last))
    assert code == 143 and complaint.startswith("stopped: the same command continues from step")
    assert sorted(statuses(summary).values()) == ["failed", "skipped", "succeeded"]


@pytest.mark.parametrize(("settings", "place"), [({}, "{runs}/.checkpoints"), ({"checkpoints": "gs://b/c"}, "gs://b/c")])
def test_a_step_is_told_where_its_checkpoints_are_kept(
    settings: dict[str, Any], place: str, run: Any, tmp_path: Path
) -> None:
    assert run(replace(ending_in(tell), settings=settings))[0] == 0
    (told,) = tmp_path.glob("runs/.artifacts/*/grow/model/told")
    assert told.read_text() == place.format(runs=tmp_path / "runs")


def test_two_runs_in_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    from pipeline.runs import RunFolder

    folders = {RunFolder.create(tmp_path).path for _ in range(20)}
    assert len(folders) == 20
    assert (tmp_path / "latest").resolve() in folders


def test_alerts_are_on_the_screen_in_the_table_and_in_the_summary_with_the_way_to_the_report(run: Any) -> None:
    _, summary, printed, _ = run(alarming(end_well=True))
    assert summary["steps"][0]["alerts"] == [{"name": "kl_runaway", "update": 12, "message": "The KL is 31."}]
    lines = printed.splitlines()
    assert lines.count("rl         alert at 12: kl_runaway: The KL is 31.") == 1
    assert lines.count("           1 alert: kl_runaway at 12") == 1
    (report,) = [line.split()[1] for line in lines if line.startswith("  rl ")]
    assert report.endswith(f"{summary['run_id']}/rl/report/report.html") and Path(report).exists()

    _, again, printed, _ = run(alarming(end_well=True))  # the model in the cache is the one alerted of
    assert again["steps"][0]["status"] == "cached" and again["steps"][0]["alerts"] == summary["steps"][0]["alerts"]
    assert "alert at 12" not in printed and "1 alert: kl_runaway at 12" in printed


def test_a_step_that_failed_keeps_its_alerts(run: Any) -> None:
    _, summary, printed, _ = run(alarming(end_well=False))
    assert summary["steps"][0]["status"] == "failed"
    assert [alert["update"] for alert in summary["steps"][0]["alerts"]] == [12]
    assert "1 alert: kl_runaway at 12" in printed


def test_a_line_of_alerts_that_was_never_finished_is_left_out(tmp_path: Path) -> None:
    assert read_alerts(None) == read_alerts(tmp_path) == []
    whole = json.dumps({"name": "a", "update": 1, "message": "b"})
    (tmp_path / "alerts.jsonl").write_text(f"{whole}\n{whole[:9]}")
    assert [alert["name"] for alert in read_alerts(tmp_path)] == ["a"]
