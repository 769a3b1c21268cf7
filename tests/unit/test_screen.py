"""What a run shows."""

import io
import logging

import pytest

from components import tracking
from pipeline import screen as screens
from pipeline.screen import Pace, Screen, Tick, alerted, duration, telling
from pipeline.summary import Result


def test_a_progress_line_is_parsed_and_others_are_not() -> None:
    tick = Tick.parse("    progress sft train 3/12 loss=0.5 lr=1e-05\n")
    assert tick == Tick("sft train", 3, 12, "loss=0.5 lr=1e-05")
    assert Tick.parse("progress rl 1/2\n") == Tick("rl", 1, 2, "")
    assert Tick.parse("making progress on 1/2 of it") is None


def test_rate_and_time_left_are_measured_from_the_first_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(screens.time, "monotonic", lambda: now)
    pace = Pace("rl", first_done=10)
    assert pace.text(Tick("rl", 10, 100, "")) == "10/100 10%"
    now = 110.0  # 20 more in 10 s are 2/s; 70 are left
    assert pace.text(Tick("rl", 30, 100, "")) == "30/100 30%  2/s  35.0 s left"


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(screens.time, "monotonic", lambda: now)
    stream = io.StringIO()
    screen = Screen(stream)
    screen.started("rl")
    for done in range(1, 41):
        now += 1
        screen.printed("rl", f"progress rl {done}/40 kl=0.1\n")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "rl         started"
    assert [line.split()[1] for line in lines[1:]] == ["15/40", "30/40"]
    assert "kl=0.1" in lines[1]


def test_a_task_shows_its_telling_numbers_or_else_its_first_ones() -> None:
    metrics = {"loss/train": 1.0, "eval/loss": 2.0, "eval/loss_before": 3.0, "x": 4.0}
    assert telling(Result("sft", "succeeded", metrics=metrics)) == "eval/loss_before 3  eval/loss 2"
    assert telling(Result("other", "succeeded", metrics=metrics)) == "loss/train 1  eval/loss 2  eval/loss_before 3"


def test_the_table_names_every_task_and_how_the_run_ended() -> None:
    stream = io.StringIO()
    Screen(stream).table("rejected", 75, [Result("sft", "cached"), Result("upload", "skipped")])
    assert stream.getvalue().splitlines()[2:] == [
        "sft        cached        0.0 s",
        "upload     skipped",
        "",
        "rejected in 1:15",
    ]


@pytest.mark.parametrize(
    "written", ["%(levelname)s %(name)s: %(message)s", "[KFP Executor %(asctime)s %(levelname)s]: %(message)s"]
)
def test_an_alert_is_shown_when_it_is_given_and_other_warnings_are_not(
    written: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    caplog.handler.setFormatter(logging.Formatter(written))
    tracking.log_alert("kl_runaway", 12, "The KL is 31.")
    stream = io.StringIO()
    screen = Screen(stream)
    screen.started("rl")
    screen.printed("rl", caplog.text)
    screen.printed("rl", "WARNING components.training: update 3: gradient norm is nan; the step is skipped\n")
    assert stream.getvalue().splitlines()[1:] == ["rl         alert at 12: kl_runaway: The KL is 31."]


def test_the_table_sums_up_a_tasks_alerts() -> None:
    alerts = [{"name": name, "update": update, "message": ""} for name, update in (("a", 3), ("b", 4), ("a", 9))]
    assert alerted(Result("rl", "succeeded", alerts=alerts[:1])) == "1 alert: a at 3"
    stream = io.StringIO()
    Screen(stream).table("succeeded", 75, [Result("rl", "succeeded", alerts=alerts), Result("upload", "skipped")])
    assert stream.getvalue().splitlines()[2:5] == [
        "rl         succeeded     0.0 s",
        "           3 alerts: a at 3, b at 4",
        "upload     skipped",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (245, "4:05"), (3723, "1:02:03")])
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
