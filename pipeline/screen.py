"""What `plumbline run` shows: a line per task, a bar while one works, a table at the end."""

import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from pipeline.summary import Result

TELLING: dict[str, tuple[str, ...]] = {
    "preprocess": ("preprocess/num_rows", "preprocess/num_dropped"),
    "base": ("eval/loss", "base/num_parameters"),
    "validate": ("validate/num_rows", "validate/num_errors", "validate/num_warnings"),
    "sft": ("eval/loss_before", "eval/loss"),
    "reward": ("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high"),
    "cost": ("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high"),
    "rl": ("rollout/score", "rollout/cost", "rollout/kl_k3"),
    "evaluate": ("eval/win_rate", "gold/harmful", "gold/helpful", "eval/reward_gain", "eval/cost_gain"),
    "infer": ("infer/num_responses", "infer/reward", "infer/cost"),
}
"""The metrics worth a place on the line of a task; a task without its own shows its first ones."""
SHOWN = 3
PLAIN_S = 15.0
STYLES = {
    "succeeded": "green",
    "cached": "cyan",
    "skipped": "dim",
    "failed": "bold red",
    "rejected": "yellow",
    "canceled": "yellow",
    "running": "bold",
    "waiting": "dim",
}
UNTIMED = ("skipped", "waiting")
"""The states in which a task has taken no time."""
ALERT_STYLE = "yellow"
PROGRESS_LINE = re.compile(r"^\s*progress (?P<label>.+?) (?P<done>\d+)/(?P<total>\d+)(?P<values>(?: \S+=\S+)*)\s*$")
ALERT_LINE = re.compile(r"\bWARNING\b.*?: alert (?P<name>\S+) at (?P<update>\d+): (?P<message>.+)$")
"""As `tracking.log_alert` logs it; what stands before it depends on who set up logging, Kubeflow's executor or we."""


@dataclass
class Tick:
    """How far a task is: parsed from a line of its output."""

    label: str
    done: int
    total: int
    values: str

    @classmethod
    def parse(cls, line: str) -> "Tick | None":
        """The progress that a line reports, or None for any other line."""
        match = PROGRESS_LINE.match(line)
        if match is None:
            return None
        return cls(match["label"], int(match["done"]), int(match["total"]), match["values"].strip())


@dataclass
class Pace:
    """Speed and time left of one stretch of work, measured from its first tick."""

    label: str
    first_done: int
    since: float = field(default_factory=lambda: time.monotonic())

    def text(self, tick: Tick) -> str:
        """Count, share, rate and time left."""
        elapsed = time.monotonic() - self.since
        done = tick.done - self.first_done
        text = f"{tick.done}/{tick.total} {100 * tick.done // max(tick.total, 1)}%"
        if done <= 0 or elapsed <= 0:
            return text
        rate = done / elapsed
        return f"{text}  {rate:.3g}/s  {duration((tick.total - tick.done) / rate)} left"


class Screen:
    """The terminal, or the file the output goes to."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._bar = _LiveBar(self.console) if self.console.is_terminal else _PlainBar(self.console)

    def line(self, text: str) -> None:
        """One line of text, as it is."""
        self.console.print(Text(text))

    def started(self, task: str) -> None:
        """A task starts working."""
        self.line(f"{task:<11}started")
        self._bar.begin(task)

    def printed(self, task: str, line: str) -> None:
        """A task said something: shown where it is progress or an alert."""
        if tick := Tick.parse(line):
            self._bar.tick(task, tick)
        elif alert := ALERT_LINE.search(line):
            text = f"{task:<11}alert at {alert['update']}: {alert['name']}: {alert['message']}"
            self.console.print(Text(text, ALERT_STYLE))

    def ended(self, result: Result) -> None:
        """A task ended."""
        self._bar.end()
        word = "done" if result.status == "succeeded" else result.status
        text = Text(f"{result.task:<11}")
        text.append(f"{word:<8}", STYLES[result.status])
        text.append(f"{duration(result.seconds):>7}   {telling(result)}".rstrip())
        self.console.print(text)

    def stopped(self) -> None:
        """The run ends, whatever was under way."""
        self._bar.end()

    def table(self, status: str, seconds: float, results: Iterable[Result]) -> None:
        """All tasks once more, and how the run ended or how long it has been going on."""
        self.line("")
        for row in rows(results):
            self.console.print(row)
        word = "for" if status == "running" else "in"
        self.console.print(Text(f"\n{status} {word} {duration(seconds)}", STYLES[status]))

    def paths(self, places: Mapping[str, Any]) -> None:
        """Where to look: a name and a place per line, those without a place left out."""
        for name, place in places.items():
            if place:
                self.line(f"  {name:<9}{place}")


def rows(results: Iterable[Result]) -> list[Text]:
    """The lines of a table of tasks, its head included."""
    table = [Text(f"{'step':<11}{'status':<11}{'time':>8}")]
    for result in results:
        text = Text(f"{result.task:<11}")
        text.append(f"{result.status:<11}", STYLES[result.status])
        text.append(f"{'' if result.status in UNTIMED else duration(result.seconds):>8}   ")
        text.append(telling(result))
        text.rstrip()
        table.append(text)
        if result.alerts:
            table.append(Text(f"{'':<11}{alerted(result)}", ALERT_STYLE))
    return table


def telling(result: Result) -> str:
    """The two or three numbers of a task that say how it went."""
    names: Sequence[str] = [name for name in TELLING.get(result.task, ()) if name in result.metrics]
    names = names or list(result.metrics)
    return "  ".join(f"{name} {result.metrics[name]:.4g}" for name in names[:SHOWN])


def alerted(result: Result) -> str:
    """How many alerts a task gave, and for each kind at which update it came first."""
    first: dict[str, int] = {}
    for alert in result.alerts:
        first.setdefault(alert["name"], alert["update"])
    number = len(result.alerts)
    kinds = ", ".join(f"{name} at {update}" for name, update in first.items())
    return f"{number} alert{'s' if number != 1 else ''}: {kinds}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 3.2 s, 4:05 or 1:02:03."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _LiveBar:
    """A bar on a terminal, gone when its task ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._bar = TaskID(0)
        self._pace: Pace | None = None

    def begin(self, task: str) -> None:
        columns = (
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(30), TimeElapsedColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )  # fmt: skip
        self._pace = None
        self._progress = Progress(*columns, console=self._console, transient=True, refresh_per_second=4)
        self._bar = self._progress.add_task(task, total=None, text="")
        self._progress.start()

    def tick(self, task: str, tick: Tick) -> None:
        if self._progress is None:
            return
        if self._pace is None or self._pace.label != tick.label:
            self._pace = Pace(tick.label, tick.done)
        text = f"{self._pace.text(tick)}  {tick.values}"
        name = task if tick.label == task else f"{task} {tick.label}"
        self._progress.update(self._bar, description=name, total=tick.total, completed=tick.done, text=text)

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _PlainBar:
    """A line now and then, where the output is a file or a pipe."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace: Pace | None = None
        self._printed_at = 0.0

    def begin(self, task: str) -> None:
        self._pace, self._printed_at = None, time.monotonic()

    def tick(self, task: str, tick: Tick) -> None:
        if self._pace is None or self._pace.label != tick.label:
            self._pace = Pace(tick.label, tick.done)
        if time.monotonic() - self._printed_at >= PLAIN_S:
            self._printed_at = time.monotonic()
            label = "" if tick.label == task else f"{tick.label} "
            self._console.print(Text(f"{task:<11}{label}{self._pace.text(tick)}  {tick.values}"))

    def end(self) -> None:
        self._pace = None
