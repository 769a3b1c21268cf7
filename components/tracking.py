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
from typing import Any, NamedTuple, Self

logger = logging.getLogger(__name__)

PARENT_RUN = "PLUMBLINE_PARENT_RUN"
METRICS_FILE = "metrics.jsonl"
PARENT_TAG = "mlflow.parentRunId"
MAX_PARAM = 500  # characters that every MLflow store accepts as a value
MAX_PARAMS = 100  # params in one batch, MLflow's limit
MAX_BATCH = 1000  # metrics in one batch, MLflow's limit
FLUSH_S = 5.0


class Row(NamedTuple):
    """The numbers of one update, and when they were logged (seconds since 1970)."""

    update: int
    time: float
    metrics: dict[str, float]


class MlflowRun:
    """One run in MLflow, written to in batches."""

    def __init__(self, client: Any, run_id: str, experiment_id: str) -> None:
        self.client, self.run_id, self.experiment_id = client, run_id, experiment_id

    @classmethod
    def attach(cls, run_id: str) -> Self:
        """A run that exists."""
        client = _client()
        return cls(client, run_id, client.get_run(run_id).info.experiment_id)

    @classmethod
    def create(cls, experiment: str, name: str, artifacts: Path | None = None) -> Self:
        """A new run in an experiment, created when there is none; `artifacts` is its local file store."""
        client = _client()
        found = client.get_experiment_by_name(experiment)
        location = None if artifacts is None else artifacts.absolute().as_uri()
        experiment_id = found.experiment_id if found else client.create_experiment(experiment, location)
        return cls(client, client.create_run(experiment_id, run_name=name).info.run_id, experiment_id)

    def nested(self, name: str) -> "MlflowRun":
        """A new run below this one."""
        run = self.client.create_run(self.experiment_id, run_name=name, tags={PARENT_TAG: self.run_id})
        return MlflowRun(self.client, run.info.run_id, self.experiment_id)

    def log_params(self, settings: Mapping[str, Any]) -> None:
        """The settings, one param per dotted key, cut to what MLflow stores."""
        from mlflow.entities import Param

        params = [Param(key, str(value)[:MAX_PARAM]) for key, value in flattened(settings)]
        for start in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(self.run_id, params=params[start : start + MAX_PARAMS])

    def log_metrics(self, rows: list[tuple[str, float, int, int]]) -> None:
        """Rows of (name, value, time in milliseconds, update)."""
        from mlflow.entities import Metric

        for start in range(0, len(rows), MAX_BATCH):
            self.client.log_batch(self.run_id, metrics=[Metric(*row) for row in rows[start : start + MAX_BATCH]])

    def log_final(self, metrics: Mapping[str, float], update: int = 0) -> None:
        """A step's final numbers, at its last update: MLflow shows the latest as the value."""
        now = int(time.time() * 1000)
        self.log_metrics([(name, float(value), now, update) for name, value in metrics.items()])

    def log_artifacts(self, path: Path, under: str | None = None) -> None:
        """A file, or every file of a folder."""
        log = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        log(self.run_id, str(path), under)

    def set_tag(self, key: str, value: str) -> None:
        """A tag of the run."""
        self.client.set_tag(self.run_id, key, value)

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED, and those of its children that nobody closed."""
        condition = f"tags.`{PARENT_TAG}` = '{self.run_id}' and attributes.status = 'RUNNING'"
        for orphan in self.client.search_runs([self.experiment_id], condition):
            self.client.set_terminated(orphan.info.run_id, "KILLED")
        self.client.set_terminated(self.run_id, status)


class Tracker:
    """Where the numbers of one step go while it runs."""

    def __init__(self, folder: Path, run: MlflowRun | None) -> None:
        self._file = folder / METRICS_FILE
        self._run = run
        self._rows: list[tuple[str, float, int, int]] = []
        self._flushed_at = time.monotonic()
        self._update = 0

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None when nothing is tracked there."""
        return self._run.run_id if self._run else None

    def log_metrics(self, row: Row) -> None:
        """Append to metrics.jsonl now and to MLflow with the next batch."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(_line(row))
        self._send(row)
        if len(self._rows) >= MAX_BATCH or time.monotonic() - self._flushed_at > FLUSH_S:
            self.flush()

    def replay(self, rows: Sequence[Row]) -> None:
        """Make metrics.jsonl hold exactly these rows, and give them to MLflow with the times they have."""
        temporary = self._file.with_name(f".{self._file.name}.part")
        temporary.write_text("".join(map(_line, rows)), encoding="utf-8")
        temporary.replace(self._file)
        for row in rows:
            self._send(row)
        self.flush()

    def log_artifacts(self, folder: Path) -> None:
        """Keep a folder of results with the MLflow run."""
        self.attempt(lambda run: run.log_artifacts(folder, folder.name))

    def flush(self) -> None:
        """Send what is waiting."""
        rows, self._rows, self._flushed_at = self._rows, [], time.monotonic()
        if rows:
            self.attempt(lambda run: run.log_metrics(rows))

    def _send(self, row: Row) -> None:
        self._update = row.update
        at = round(row.time * 1000)
        self._rows += [(name, float(value), at, row.update) for name, value in row.metrics.items()]

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
        _active.log_metrics(row)
    return row


def replay(rows: Sequence[Row]) -> None:
    """Track the rows of a checkpoint's history once more, and no other: those of lost updates are gone."""
    if _active is not None and _is_first_rank():
        _active.replay(rows)


def log_artifacts(folder: Path) -> None:
    """Keep a folder (a report) with the step's MLflow run; nothing outside a step or off rank 0."""
    if _active is not None and _is_first_rank():
        _active.log_artifacts(folder)


@contextmanager
def track(name: str, settings: Mapping[str, Any], folder: Path) -> Iterator[Tracker]:
    """The tracker of a step, active until the step ends; metrics.jsonl starts anew in `folder`."""
    global _active
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS_FILE).unlink(missing_ok=True)
    inherited = "MLFLOW_RUN_ID" in os.environ
    _active = tracker = Tracker(folder, _step_run(name) if _is_first_rank() else None)
    tracker.attempt(lambda run: run.log_params(settings))
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
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


def flattened(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested settings under its dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{above}{key}.")
        else:
            yield above + key, value


def _line(row: Row) -> str:
    """A row as metrics.jsonl has it."""
    return json.dumps({"update": row.update, "time": row.time, **row.metrics}) + "\n"


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


def _client() -> Any:
    """MLflow's client for the address in the environment."""
    import mlflow

    for chatty in ("alembic", "mlflow.store.db.utils"):  # a line per migration of a new database
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return mlflow.MlflowClient()


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"
