"""Numbers over updates: always to metrics.jsonl, and to an MLflow run where an address is set.

A step's run is nested under the run of the pipeline (`PLUMBLINE_PARENT_RUN`, set by `plumbline run`). Inside
Kubeflow, MLFLOW_RUN_ID names a run that exists already, and that one is used. Only rank 0 tracks. When MLflow
fails, training goes on: one warning, and the file has everything.
"""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from components.mlflow_run import MAX_BATCH, MlflowRun
from components.ranks import is_first as _is_first_rank
from components.termination import Terminated

logger = logging.getLogger(__name__)

PARENT_RUN = "PLUMBLINE_PARENT_RUN"
METRICS_FILE = "metrics.jsonl"
ALERTS_FILE = "alerts.jsonl"
FLUSH_S = 5.0


class Row(NamedTuple):
    """The numbers of one update, and when they were logged (seconds since 1970)."""

    update: int
    time: float
    metrics: dict[str, float]


class Tracker:
    """Where the numbers of one step go while it runs."""

    def __init__(self, folder: Path, run: MlflowRun | None) -> None:
        self.folder = folder
        self.history: list[Row] = []
        self._file = folder / METRICS_FILE
        self._run = run
        self._rows: list[tuple[str, float, int, int]] = []
        self._flushed_at = time.monotonic()
        self._update = 0

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None when nothing is tracked there."""
        return self._run.run_id if self._run else None

    def log_metrics(self, rows: Sequence[Row]) -> None:
        """Append to metrics.jsonl now and to MLflow with the next batch."""
        with self._file.open("a", encoding="utf-8") as file:
            lines = (json.dumps({"update": row.update, "time": row.time, **row.metrics}) + "\n" for row in rows)
            file.write("".join(lines))
        self.history += rows
        for row in rows:
            self._update, at = row.update, round(row.time * 1000)
            self._rows += [(name, float(value), at, row.update) for name, value in row.metrics.items()]
        if len(self._rows) >= MAX_BATCH or time.monotonic() - self._flushed_at > FLUSH_S:
            self.flush()

    def log_alert(self, name: str, update: int, message: str) -> None:
        """Append to alerts.jsonl, and tag the MLflow run with the latest alert of this name."""
        with (self.folder / ALERTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "update": update, "message": message}) + "\n")
        self.attempt(lambda run: run.set_tag(f"alert.{name}", f"at {update}: {message}"))

    def log_artifacts(self, folder: Path) -> None:
        """Keep a folder of results with the MLflow run."""
        self.attempt(lambda run: run.log_artifacts(folder, folder.name))

    def flush(self) -> None:
        """Send what is waiting."""
        rows, self._rows, self._flushed_at = self._rows, [], time.monotonic()
        if rows:
            self.attempt(lambda run: run.log_metrics(rows))

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Send everything, and the step's final numbers."""
        self.flush()
        self.attempt(lambda run: run.log_final(metrics, self._update))

    def attempt(self, action: Callable[[MlflowRun], None]) -> None:
        """Do something with the MLflow run; the first failure is the last attempt."""
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # a tracking server's troubles must not end hours of training
            reason = without_password(error)
            logger.warning("MLflow failed (%s); from here on numbers go to %s alone", reason, self._file)
            self._run = None


_active: Tracker | None = None


def log_metrics(metrics: Mapping[str, float], update: int) -> Row:
    """Track numbers of an update of the step that runs (nothing outside a step or off rank 0); gives the row back."""
    row = Row(update, round(time.time(), 3), dict(metrics))
    if _active is not None and _is_first_rank():
        _active.log_metrics([row])
    return row


def replay(rows: Sequence[Row]) -> None:
    """Track the rows of a checkpoint's history, with the times they have, in place of those of an earlier start.

    A step that starts again begins its metrics.jsonl anew, so that the rows of updates that were lost are gone.
    """
    if _active is not None and _is_first_rank():
        _active.log_metrics(rows)


def history() -> list[Row]:
    """Every row of the step that runs, replayed ones too; none outside a step and off rank 0."""
    return list(_active.history) if _active is not None and _is_first_rank() else []


def log_alert(name: str, update: int, message: str) -> None:
    """Warn that something is wrong since an update, and track it; nothing off rank 0."""
    if _is_first_rank():
        logger.warning("alert %s at %d: %s", name, update, message)
        if _active is not None:
            _active.log_alert(name, update, message)


def folder() -> Path | None:
    """Where the files of the step that runs are, metrics.jsonl among them; None outside a step and off rank 0."""
    return _active.folder if _active is not None and _is_first_rank() else None


def log_artifacts(folder: Path) -> None:
    """Keep a folder (a report) with the step's MLflow run; nothing outside a step or off rank 0."""
    if _active is not None and _is_first_rank():
        _active.log_artifacts(folder)


@contextmanager
def track(name: str, settings: Mapping[str, Any], folder: Path) -> Iterator[Tracker]:
    """The tracker of a step, active until the step ends; its files start anew in `folder`."""
    global _active
    if _is_first_rank():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / METRICS_FILE).unlink(missing_ok=True)
        (folder / ALERTS_FILE).unlink(missing_ok=True)
    inherited = "MLFLOW_RUN_ID" in os.environ
    _active = tracker = Tracker(folder, _step_run(name) if _is_first_rank() else None)
    tracker.attempt(lambda run: run.log_params(settings))
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except (KeyboardInterrupt, Terminated):
        status = "KILLED"
        raise
    finally:
        _active = None
        tracker.flush()
        if not inherited:  # whoever opened the run closes it
            tracker.attempt(lambda run: run.end(status))


def without_password(shown: object) -> str:
    """A text to show, such as an address or an error: no address in it names a user or a password.

    A password may hold any character but white space, so everything up to the last @ goes.
    """
    return re.sub(r"://(?:[^\s/:@]*:\S*|[^\s/]*)@", "://", str(shown))


def _step_run(name: str) -> MlflowRun | None:
    """The MLflow run of a step: Kubeflow's, or a new one below the pipeline's, or None without an address."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    try:
        if run_id := os.environ.get("MLFLOW_RUN_ID"):
            return MlflowRun.attach(run_id)
        if parent := os.environ.get(PARENT_RUN):
            return MlflowRun.attach(parent).nested(name)
        return MlflowRun.create(os.environ.get("MLFLOW_EXPERIMENT_NAME", "plumbline"), name)
    except Exception as error:  # as in Tracker.attempt
        address, reason = without_password(os.environ["MLFLOW_TRACKING_URI"]), without_password(error)
        logger.warning("MLflow at %s failed (%s); nothing is tracked there", address, reason)
        return None
