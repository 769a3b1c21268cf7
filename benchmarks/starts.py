"""Steps started in processes of their own, stopped by a signal and started again, as a cluster does.

The processes are forked from one that has loaded everything (`preloaded`), so that a start takes a fraction of a
second. A step that trains shows in shared memory where it stands: it is known what a signal fell on, and how much was
still done after it.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from multiprocessing import forkserver
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TextIO
from unittest.mock import patch

from components.artifacts import read_json, verify_manifest
from components.settings import StepSettings

PHASES = ("outside", "sampling", "learning", "saving", "ending")
OUTSIDE, SAMPLING, LEARNING, SAVING, ENDING = PHASES
"""Before and after training; making a batch; learning from it; writing a checkpoint; saving what was learned."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",  # what is killed leaves semaphores
}
CLEARED = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "PLUMBLINE_CHECKPOINTS", "PLUMBLINE_RUN_DIR")
LIMIT_S = 300.0


class Stop(NamedTuple):
    """When a start is sent a signal."""

    rows: int
    """Once metrics.jsonl has so many rows, those of earlier starts among them,"""
    updates: int | None = None
    """and, for rl, so many updates are done on the batch that comes then; 0 is when it begins to be made;"""
    delay_s: float = 0.0
    """so long after that."""
    signal: int = signal.SIGKILL


class Place(NamedTuple):
    """Where a start stands."""

    phase: str
    batch: int
    """The batch (0-based) that it made last; for rl."""
    batch_updates: int
    """Updates that it took on that batch."""
    updates: int
    """Updates that it took altogether."""


@dataclass(frozen=True)
class Start:
    """How one start ended."""

    exit_code: int | None
    stopped: Place
    """Where it stood just after the signal was sent; where it ended, if none was."""
    ended: Place
    log: str
    """What it printed."""

    @property
    def late_updates(self) -> int:
        """Updates that it still finished after the signal."""
        return self.ended.updates - self.stopped.updates


@dataclass(frozen=True)
class Ending:
    """What a step left after one or several starts, without times and speeds."""

    starts: tuple[Start, ...]
    digest: str
    """Of the weights and what lies with them."""
    history: list[dict[str, Any]]
    """metrics.jsonl."""
    alerts: list[dict[str, Any]]
    """alerts.jsonl."""
    metrics: dict[str, float]

    @property
    def exit_codes(self) -> list[int | None]:
        """Of every start."""
        return [start.exit_code for start in self.starts]

    @property
    def result(self) -> dict[str, Any]:
        """All that must not depend on how often the step was stopped."""
        return {name: getattr(self, name) for name in ("digest", "history", "alerts", "metrics")}


class Starts:
    """Starts steps; each computes in one thread."""

    def __init__(self) -> None:
        runner = [name for name in ("pytest",) if name in sys.modules]  # what a child loads as the main module
        multiprocessing.get_context("forkserver").set_forkserver_preload(["preloaded", *runner])
        here = str(Path(__file__).parent)
        path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        with patch.dict(os.environ, ENVIRONMENT | {"PYTHONPATH": path}):
            for name in CLEARED:
                os.environ.pop(name, None)
            forkserver.ensure_running()  # with the environment that every start is to have

    def run(
        self,
        step: str,
        settings: StepSettings,
        inputs: Mapping[str, Path],
        folder: Path,
        stops: Sequence[Stop] = (),
        task: str = "",
    ) -> Ending:
        """Start the step into `folder` once for each of `stops`, and then until its end."""
        starts = [self.start(step, settings, inputs, folder, stop, task) for stop in (*stops, None)]
        return ending(folder, starts)

    def start(
        self,
        step: str,
        settings: StepSettings,
        inputs: Mapping[str, Path],
        folder: Path,
        stop: Stop | None = None,
        task: str = "",
        environment: Mapping[str, str] | None = None,
        fresh: bool = False,
    ) -> Start:
        """One start of the step into `folder`, sent a signal where `stop` says unless it ends before.

        A `fresh` one is not forked: it loads everything itself, and its hashes of texts are others.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "log.txt"):
            (folder / name).unlink(missing_ok=True)  # so that what is there is of this start
        shown = RawArray("q", len(Place._fields))
        plain, variables = settings.model_dump(mode="json"), ENVIRONMENT | dict(environment or {})
        context: Any = multiprocessing.get_context("spawn" if fresh else "forkserver")
        process = context.Process(target=follow, args=(shown, folder, variables, step, plain, dict(inputs), task))
        process.start()
        stopped = None
        if stop is not None and _reached(stop, folder, shown, process):
            os.kill(process.pid or 0, stop.signal)
            stopped = _place(shown)
        process.join(LIMIT_S)
        log = (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""
        if process.exitcode not in (0, -signal.SIGKILL, 128 + signal.SIGTERM):
            print(log)
        return Start(process.exitcode, stopped or _place(shown), _place(shown), log)


def ending(folder: Path, starts: Sequence[Start] = ()) -> Ending:
    """What lies in `folder` after these starts."""
    history = [
        {name: value for name, value in row.items() if name != "time" and not name.startswith("perf/")}
        for row in _rows(folder / "metrics.jsonl")
    ]
    metrics = {k: v for k, v in read_json(folder / "metrics").items() if not k.startswith("perf/")}
    digest = verify_manifest(folder / "model")
    return Ending(tuple(starts), digest, history, _rows(folder / "alerts.jsonl"), metrics)


def follow(
    shown: Any,
    folder: Path,
    environment: Mapping[str, str],
    step: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path],
    task: str,
) -> None:
    """What the process of a start does: the step, which shows where it stands.

    The report of rl, which takes longer than all else on tiny models, is left out.
    """
    from components.launch import launch
    from components.rl import step as rl

    os.environ.update(environment)
    with (folder / "log.txt").open("w", buffering=1) as log:
        _print_to(log)
        _show(shown)
        artifacts: dict[str, Any] = {name: SimpleNamespace(path=str(path)) for name, path in inputs.items()}
        artifacts["model"] = SimpleNamespace(path=str(folder / "model"))
        metrics = SimpleNamespace(path=str(folder / "metrics"), log_metric=lambda *_: None)
        with patch.object(rl, "write_report"):
            launch(step, settings, metrics=metrics, task=task or step, **artifacts)


def _print_to(log: TextIO) -> None:
    """Everything that this process prints goes to `log`, what libraries in C print too."""
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    sys.stdout = sys.stderr = log


def _show(shown: Any) -> None:
    """Make the training in this process show where it stands: phase, batch, updates on it and altogether."""
    from components.checkpoints import Checkpoints
    from components.rl import step as rl
    from components.rl.pairs import PairSource
    from components.rl.rollout import RolloutSource
    from components.updates import Updater

    def within(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def shows(*args: Any, **fields: Any) -> Any:
            before = shown[0]
            if phase == SAMPLING:
                shown[1], shown[2] = args[1], 0  # the batch's number
            shown[0] = PHASES.index(phase)
            result = function(*args, **fields)
            shown[0] = before
            return result

        return shows

    def counted(take_step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(take_step)
        def shows(updater: Updater) -> Any:
            result = take_step(updater)
            shown[2], shown[3] = shown[2] + 1, shown[3] + 1
            return result

        return shows

    places = [(rl, "train", LEARNING), (Checkpoints, "save", SAVING), (rl, "save_model", ENDING)]
    for owner, name, phase in (*places, (RolloutSource, "batch", SAMPLING), (PairSource, "batch", SAMPLING)):
        setattr(owner, name, within(phase, getattr(owner, name)))
    Updater.step = counted(Updater.step)  # type: ignore[method-assign]


def _place(shown: Any) -> Place:
    phase, *numbers = shown
    return Place(PHASES[phase], *numbers)


def _reached(stop: Stop, folder: Path, shown: Any, process: Any) -> bool:
    """Wait for the moment at which a start is to be stopped; whether it is still running then."""

    def before() -> bool:
        rows = len(_lines(folder / "metrics.jsonl"))
        if rows != stop.rows or stop.updates is None:
            return rows < stop.rows
        return shown[0] == PHASES.index(OUTSIDE) or (shown[1], shown[2]) < (stop.rows, stop.updates)

    while process.is_alive() and before():
        time.sleep(0.001)
    time.sleep(stop.delay_s)
    return process.is_alive() is True


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; none while there is no file."""
    return [json.loads(line) for line in _lines(path)]
