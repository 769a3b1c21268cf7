"""What a run in MLflow is to be told, until it has been told: in order, again after a failure, by a thread of its own.

A thread, since nothing less keeps training from waiting: looking up a name has no time-out, and a server that takes
two seconds over a batch is slow and not gone. After a failure the thread waits longer and longer, up to a minute.

Metrics are read from metrics.jsonl, which so is the buffer. Telling MLflow anything twice changes nothing: it keeps
one point of the same name, update, time and value, params and tags stay what they are, and a run is found again by
its start. Therefore what was sent without an answer is sent again. What is left at the end is kept in unsent.json
beside the metrics, and `send` tells it later.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ValidationError

from components.artifacts import read_json, write_json
from components.errors import InputError
from components.mlflow_run import MAX_BATCH, MlflowRun, Point
from components.mlflow_server import passing, persist, reason, refused

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
UNSENT_FILE = "unsent.json"
EVERY_S = 5.0
LONGEST_S = 60.0
CLOSING_PAUSE_S = 1.0
Method = Literal["log_params", "log_metrics", "log_artifacts", "log_cached", "set_tag", "end"]


class Note(BaseModel):
    """One thing to tell: a method of MlflowRun, and plain values for it."""

    method: Method
    arguments: list[Any]


class Record(BaseModel):
    """Which run it is, and everything that it is to be told besides the metrics in the file."""

    address: str
    """The server's, without user and password."""
    name: str
    start: str
    """What the run is found by; see MlflowRun."""
    run_id: str | None = None
    """None while the run is still to be made, below `parent`."""
    parent: str | None = None
    notes: list[Note] = []

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What the folder's unsent.json keeps. Raises InputError when it is not there or not ours."""
        try:
            return cls.model_validate(read_json(folder / UNSENT_FILE))
        except ValidationError as error:
            wrong = error.errors()[0]["msg"]
            raise InputError(f"{folder / UNSENT_FILE}: not what plumbline left there: {wrong}.") from None


class Outbox:
    """Notes and metrics of one run on their way to MLflow."""

    def __init__(
        self, folder: Path, record: Record, run: MlflowRun | None, warn: Callable[[str], None] = logger.warning
    ) -> None:
        self.folder, self.record, self.run = folder, record, run
        self._warn = warn
        self._told = 0  # notes
        self._sent = 0  # bytes of metrics.jsonl
        self._refused: set[Method] = set()
        self._error: Exception | None = None  # of the last attempt
        self._closing = threading.Event()
        self._until = 0.0
        self._thread = threading.Thread(target=self._work, name=f"mlflow {record.name}", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def put(self, method: Method, *arguments: Any) -> None:
        """Tell this after what was put before; never waits."""
        self.record.notes.append(Note(method=method, arguments=list(arguments)))

    def close(self, within_s: float) -> str | None:
        """Send what is left for so many seconds; the reason when not all could be sent, which unsent.json then has."""
        unsent = self.folder / UNSENT_FILE
        write_json(unsent, self.record.model_dump())  # now: SIGTERM may cut the waiting short
        self._until = time.monotonic() + within_s
        self._closing.set()
        self._thread.join(within_s)
        if not self._thread.is_alive() and self._error is None:
            unsent.unlink()
            return None
        return reason(self._error) if self._error else f"no answer within {within_s:.0f} seconds"

    def deliver(self) -> None:
        """Send everything there is. Raises the first error but those of notes that will never be accepted."""
        if self.run is None:
            self.run = self._opened()
        while True:
            points, end = self._points()
            if end > self._sent:
                self._tell(Note(method="log_metrics", arguments=[points]))
                self._sent = end
            elif self._told < len(self.record.notes):
                self._tell(self.record.notes[self._told])
                self._told += 1
            else:
                return

    def _opened(self) -> MlflowRun:
        """The run of the record, made now where it was not yet."""
        record = self.record
        if record.run_id is not None:
            return MlflowRun.attach(record.run_id)
        assert record.parent is not None
        run = MlflowRun.attach(record.parent).nested(record.name, record.start)
        record.run_id = run.run_id
        return run

    def _points(self) -> tuple[list[Point], int]:
        """The next metrics of the file, a batch or a little more, and where in the file they end."""
        points, end = list[Point](), self._sent
        try:
            with (self.folder / METRICS_FILE).open("rb") as file:
                file.seek(end)
                for line in file:
                    if len(points) >= MAX_BATCH or not line.endswith(b"\n"):  # the rest is being written
                        break
                    row = json.loads(line)
                    update, at = row.pop("update"), round(row.pop("time") * 1000)
                    points += [(name, value, at, update) for name, value in row.items()]
                    end += len(line)
        except FileNotFoundError:  # nothing was logged yet
            pass
        return points, end

    def _tell(self, note: Note) -> None:
        """Do what the note says; where MLflow will never accept it, warn once per method and go on."""
        arguments = list(note.arguments)
        if note.method == "log_artifacts":
            arguments[0] = str(self.folder / arguments[0])
        try:
            getattr(self.run, note.method)(*arguments)
        except Exception as error:
            if not refused(error):
                raise
            if note.method not in self._refused:
                where = f"MLflow at {self.record.address}"
                self._warn(f"{where} refuses {note.method} of {self.record.name}: {reason(error)}")
            self._refused.add(note.method)

    def _work(self) -> None:
        """Deliver every few seconds, after failures less often, and when closing until it is done or time is up."""
        pause = EVERY_S
        while not self._closing.wait(pause):
            pause = EVERY_S if self._delivered() else min(2 * pause, LONGEST_S)
        while not self._delivered():
            time_left = self._until - time.monotonic()
            if self._error is None or not passing(self._error) or time_left < CLOSING_PAUSE_S:
                return
            time.sleep(CLOSING_PAUSE_S)

    def _delivered(self) -> bool:
        """Whether everything could be sent; the first failure of several is told, and that they are over."""
        failing = self._error is not None
        try:
            self.deliver()
        except Exception as error:  # a server's troubles must not end hours of training
            self._error = error
            if not failing:
                self._warn(
                    f"MLflow at {self.record.address} failed ({reason(error)}); what {self.record.name} has for it is "
                    f"kept in {self.folder} and sent when it answers"
                )
            return False
        self._error = None
        if failing:
            logger.info("MLflow at %s answers again; it has all of %s up to now", self.record.address, self.record.name)
        return True


def send(folder: Path, record: Record, within_s: float, warn: Callable[[str], None]) -> str:
    """The id of the run in MLflow that now has the record of the folder's unsent.json, which is gone then.

    Raises what MLflow raises.
    """
    outbox = Outbox(folder, record, None, warn)
    persist(outbox.deliver, within_s)
    (folder / UNSENT_FILE).unlink()
    assert record.run_id is not None
    return record.run_id
