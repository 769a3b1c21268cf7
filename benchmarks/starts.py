"""Steps started in processes of their own, stopped by a signal and started again, as a cluster does.

The processes are forked from one that has loaded everything (`preloaded`), so that a start takes a fraction of a
second. A step that trains shows where it stands (`places`): it is known what a signal fell on, and how much was still
done after it.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from components.artifacts import read_json, verify_manifest
from components.settings import StepSettings
from places import OUTSIDE, PHASES, Place, follow, place

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
            stopped = place(shown)
        process.join(LIMIT_S)
        log = (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""
        if process.exitcode not in (0, -signal.SIGKILL, 128 + signal.SIGTERM):
            print(log)
        return Start(process.exitcode, stopped or place(shown), place(shown), log)


def ending(folder: Path, starts: Sequence[Start] = ()) -> Ending:
    """What lies in `folder` after these starts."""
    history = [
        {name: value for name, value in row.items() if name != "time" and not name.startswith("perf/")}
        for row in _rows(folder / "metrics.jsonl")
    ]
    metrics = {k: v for k, v in read_json(folder / "metrics").items() if not k.startswith("perf/")}
    digest = verify_manifest(folder / "model")
    return Ending(tuple(starts), digest, history, _rows(folder / "alerts.jsonl"), metrics)


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
