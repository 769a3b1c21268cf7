"""A step in several processes of one container: torchrun starts them, and ends all when one dies.

Each process leaves a file that says how it ended, since all that torchrun tells is an exit code. The first to fail is
the step's failure; that the others then lost their connection to it is not.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from components import termination
from components.errors import InputError, TrainingFailure
from components.ranks import rank
from components.storage import get_text, put_text

logger = logging.getLogger(__name__)

JOB, ENDINGS = "PLUMBLINE_JOB", "PLUMBLINE_ENDINGS"
"""What the processes are to run, as JSON; the folder in which they leave who they are and how they ended."""
GRACE_S = 30
"""Seconds from SIGTERM to SIGKILL for processes that outlive another."""
POLL_S = 0.1
LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "TCPStore")
"""In the messages of errors that say no more than that another process is gone."""


@dataclass(frozen=True)
class Job:
    """A step to run: its settings, its paths (the last is its output) and the file that its metrics go to."""

    step: str
    settings: dict[str, Any]
    paths: dict[str, Path | None]
    metrics_file: Path
    task: str
    exchange: str = ""
    """Where inputs are fetched from by name, and the results laid; empty where every process reaches the paths."""

    def written(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def read(cls, text: str) -> "Job":
        """Take back what `written` gave."""
        values = json.loads(text)
        paths = {name: None if path is None else Path(path) for name, path in values["paths"].items()}
        return cls(**values | {"paths": paths, "metrics_file": Path(values["metrics_file"])})


@dataclass(frozen=True)
class Ending:
    """How a process ended."""

    rank: int
    kind: Literal["done", "stopped", "input", "training", "error", "lost"]
    message: str
    time: float


def run(job: Job, processes: int) -> None:
    """Run the job in so many processes.

    Raises InputError, TrainingFailure or Terminated, as the first process that failed did; TrainingFailure for any
    other error of a process, and for one that was killed. SIGTERM is handed on to all of them.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [*torchrun, f"--nproc-per-node={processes}", "--max-restarts=0", f"--shutdown-timeout={GRACE_S}"]
    logger.info("%s runs in %d processes", job.task, processes)
    with tempfile.TemporaryDirectory(prefix="plumbline-") as name, termination.watch() as watch:
        folder, command = Path(name), [*command, "-m", "components.launch"]
        child = subprocess.Popen(command, env={**os.environ, JOB: job.written(), ENDINGS: name})
        try:
            handed_on = False
            while child.poll() is None:
                if watch.requested and not handed_on:
                    _hand_on(folder, child)
                    handed_on = True
                time.sleep(POLL_S)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
        raise_first(endings(name, processes), processes, child.returncode == 0, watch.requested)


def enter() -> None:
    """Leave word of this process, for who started it on this machine."""
    if folder := os.environ.get(ENDINGS):
        (Path(folder) / f"{rank()}.pid").write_text(str(os.getpid()), encoding="utf-8")


def leave(error: BaseException | None) -> None:
    """Leave word of how this process ended, where another started it."""
    if folder := os.environ.get(ENDINGS):
        ending = Ending(rank(), _kind(error), "" if error is None else _message(error), time.time())
        put_text(json.dumps(asdict(ending)), f"{folder}/{ending.rank}.json")


def endings(folder: str, processes: int) -> list[Ending]:
    """How the processes ended that could say so, in the order in which they did."""
    texts = [get_text(f"{folder}/{number}.json").content for number in range(processes)]
    return sorted((Ending(**json.loads(text)) for text in texts if text), key=lambda ending: ending.time)


def raise_first(found: list[Ending], processes: int, fine: bool, asked: bool) -> None:
    """Raise what the first process to fail ended with; nothing where all are done, and what ran them says so.

    `asked` is whether they were asked to stop.
    """
    if fine and [ending.kind for ending in found] == ["done"] * processes:
        return
    failures = [ending for ending in found if ending.kind in ("input", "training", "error")]
    if failures:
        if failures[0].kind == "input":
            raise InputError(failures[0].message)
        raise TrainingFailure(f"process {failures[0].rank + 1} of {processes}: {failures[0].message}")
    if asked:
        raise termination.Terminated
    if silent := sorted(set(range(processes)) - {ending.rank for ending in found}):
        raise TrainingFailure(
            f"process {silent[0] + 1} of {processes} ended without a word, and the others with it: it was killed, "
            "perhaps for want of memory. Raise the task's memory, lower the micro-batches, or divide more "
            "(compute.strategy). The same command continues from the newest checkpoint, where there is one."
        )
    first = next((ending for ending in found if ending.kind == "lost"), found[0])
    raise TrainingFailure(f"process {first.rank + 1} of {processes} lost the others: {first.message}")


def _kind(error: BaseException | None) -> Literal["done", "stopped", "input", "training", "error", "lost"]:
    match error:
        case None:
            return "done"
        case termination.Terminated():
            return "stopped"
        case InputError():
            return "input"
        case TrainingFailure():
            return "training"
    return "lost" if any(sign in str(error) for sign in LOST) else "error"


def _message(error: BaseException) -> str:
    expected = isinstance(error, InputError | TrainingFailure | termination.Terminated)
    return str(error) if expected else f"{type(error).__name__}: {error}"


def _hand_on(folder: Path, child: "subprocess.Popen[bytes]") -> None:
    """Ask every process to stop; torchrun, where they have not started, and would only give them `GRACE_S`."""
    pids = [int(path.read_text("utf-8") or 0) for path in folder.glob("*.pid")]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    if not pids:
        child.terminate()
