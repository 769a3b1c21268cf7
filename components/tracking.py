"""Numbers over updates: always to metrics.jsonl, and to an MLflow run where an address is set.

A step's run is nested under the run of the pipeline (`PLUMBLINE_PARENT_RUN`, set by `plumbline run`; on a cluster
the one that is found by PLUMBLINE_PIPELINE_RUN, Kubeflow's id). Where Kubeflow's own plugin is at work, MLFLOW_RUN_ID
names a run that exists already, and that one is used. Only rank 0 tracks. A server that
cannot be reached when tracking starts is an error, unless PLUMBLINE_MLFLOW=optional; one that fails later, the
pipeline's run being there, is told everything when it answers again (outbox.py), and training goes on.
"""

import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from components.mlflow_run import MlflowRun, final_points
from components.mlflow_server import (
    ADDRESS,
    START_S,
    address,
    failure_at_start,
    is_required,
    persist,
    reason,
    without_password,
)
from components.outbox import METRICS_FILE, UNSENT_FILE, Outbox, Record
from components.pipeline_run import ERROR_TAG, MAX_ERROR, PIPELINE_RUN, found_or_made
from components.ranks import is_first as _is_first_rank
from components.termination import Terminated

logger = logging.getLogger(__name__)

PARENT_RUN = "PLUMBLINE_PARENT_RUN"
THEIR_RUN = "MLFLOW_RUN_ID"
ALERTS_FILE = "alerts.jsonl"
CLOSE_S = 30.0
KILLED_CLOSE_S = 5.0
"""A pod has 30 seconds after SIGTERM, and a checkpoint needs most of them."""


class Row(NamedTuple):
    """The numbers of one update, and when they were logged (seconds since 1970)."""

    update: int
    time: float
    metrics: dict[str, float]


class Tracker:
    """Where the numbers of one step go while it runs."""

    def __init__(self, folder: Path, outbox: Outbox | None) -> None:
        self.folder = folder
        self.history: list[Row] = []
        self._file = folder / METRICS_FILE
        self._outbox = outbox

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None when there is none, or none yet."""
        return self._outbox.record.run_id if self._outbox else None

    def log_metrics(self, rows: Sequence[Row]) -> None:
        """Append to metrics.jsonl, from which MLflow gets them a few seconds later."""
        with self._file.open("a", encoding="utf-8") as file:
            lines = (json.dumps({"update": row.update, "time": row.time, **row.metrics}) + "\n" for row in rows)
            file.write("".join(lines))
        self.history += rows

    def log_alert(self, name: str, update: int, message: str) -> None:
        """Append to alerts.jsonl, and tag the MLflow run with the latest alert of this name."""
        with (self.folder / ALERTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "update": update, "message": message}) + "\n")
        if self._outbox:
            self._outbox.put("set_tag", f"alert.{name}", f"at {update}: {message}")

    def log_artifacts(self, folder: Path) -> None:
        """Keep a folder of results, which stays as it is from here on, with the MLflow run."""
        if self._outbox:
            folder, own = folder.absolute(), self.folder.absolute()
            path = folder.relative_to(own) if folder.is_relative_to(own) else folder  # ours may move before it is sent
            self._outbox.put("log_artifacts", str(path), folder.name)

    def finish(self, metrics: Mapping[str, float]) -> None:
        """The step's final numbers, at its last update, so that MLflow shows them as the values."""
        if self._outbox:
            last = max(self.history, key=lambda row: row[:2], default=Row(0, 0.0, {}))
            self._outbox.put("log_metrics", final_points(metrics, last.update, last.time))

    def close(self, status: str) -> None:
        """Send everything; end the MLflow run as FINISHED, FAILED or KILLED where it was opened here."""
        if self._outbox is None:
            return
        if not os.environ.get(THEIR_RUN):  # whoever opened the run closes it
            self._outbox.put("end", status)
        if left := self._outbox.close(KILLED_CLOSE_S if status == "KILLED" else CLOSE_S):
            logger.warning(
                "MLflow at %s lacks numbers of this step (%s). All of them are in %s; when the server answers: "
                "plumbline track %s", self._outbox.record.address, left, self._file, self.folder,
            )  # fmt: skip


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
    """The tracker of a step, active until the step ends; its files start anew in `folder`.

    Raises InputError when MLflow must be reached and cannot be.
    """
    global _active
    outbox = None
    if _is_first_rank():
        folder.mkdir(parents=True, exist_ok=True)
        for name_of_file in (METRICS_FILE, ALERTS_FILE, UNSENT_FILE):
            (folder / name_of_file).unlink(missing_ok=True)
        outbox = _outbox(name, folder)
    _active = tracker = Tracker(folder, outbox)
    if outbox:
        outbox.put("log_params", settings)
        outbox.start()
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except (KeyboardInterrupt, Terminated):
        status = "KILLED"
        raise
    except Exception as error:
        if outbox:
            outbox.put("set_tag", ERROR_TAG, without_password(error)[:MAX_ERROR])
        raise
    finally:
        _active = None
        tracker.close(status)


def _outbox(name: str, folder: Path) -> Outbox | None:
    """What a step tells its MLflow run goes through here; None without an address, or without a server if that may be.

    Below a pipeline's run the server was there before, so it may come back. Raises InputError when it must be there
    and is not.
    """
    if not os.environ.get(ADDRESS):
        return None
    required = is_required()
    record = Record(address=address(), name=name, start=uuid.uuid4().hex)
    try:
        record.parent = parent = persist(_parent, START_S)
        run = persist(lambda: _step_run(name, record.start), 0.0 if parent else START_S)
    except Exception as error:  # MLflow's or the database's own
        if not record.parent and required:
            raise failure_at_start(error) from error
        outlook = "this step's run is made when it answers" if record.parent else "nothing is tracked there"
        logger.warning("MLflow at %s failed (%s); %s", address(), reason(error), outlook)
        return Outbox(folder, record, None) if record.parent else None
    record.run_id = run.run_id
    return Outbox(folder, record, run)


def _parent() -> str | None:
    """The id of the MLflow run of the whole pipeline, which a cluster's first task makes; None where there is none."""
    if os.environ.get(THEIR_RUN):
        return None
    if (pipeline_run := os.environ.get(PIPELINE_RUN)) and not os.environ.get(PARENT_RUN):
        os.environ[PARENT_RUN] = found_or_made(_experiment(), pipeline_run).run_id
    return os.environ.get(PARENT_RUN)


def _experiment() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME", "plumbline")


def _step_run(name: str, start: str) -> MlflowRun:
    """The MLflow run of a step: Kubeflow's, or a new one, below the pipeline's where there is one."""
    if run_id := os.environ.get(THEIR_RUN):
        return MlflowRun.attach(run_id)
    if parent := os.environ.get(PARENT_RUN):
        return MlflowRun.attach(parent).nested(name, start)
    return MlflowRun.create(_experiment(), name, start)
