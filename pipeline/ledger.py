"""The MLflow run of a whole pipeline: parent of the steps' runs, holder of settings and summary."""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from components.errors import InputError
from components.mlflow_run import MlflowRun, final_points
from components.mlflow_server import (
    ADDRESS,
    START_S,
    failure,
    failure_at_start,
    is_required,
    persist,
    reason,
    without_password,
)  # fmt: skip
from components.outbox import UNSENT_FILE, Outbox, Record, send
from components.tracking import PARENT_RUN
from pipeline.runs import RunFolder, shown
from pipeline.summary import Result
from pipeline.surroundings import environment

END = {"succeeded": "FINISHED", "rejected": "FINISHED", "failed": "FAILED"}
CLOSE_S = 30.0


def registry_environment(runs_dir: Path) -> dict[str, str]:
    """What a process needs to know to find the runs' own database; nothing when there is none or an address is set."""
    database = runs_dir.absolute() / "mlflow.db"
    return {ADDRESS: f"sqlite:///{database}"} if database.is_file() and not os.environ.get(ADDRESS) else {}


class Ledger:
    """Keeps the books of a run in MLflow.

    A server that a person named must answer at the start, unless PLUMBLINE_MLFLOW=optional. What fails later is done
    again when the server answers; what is left at the end is kept, and told once.
    """

    def __init__(self, runs_dir: Path, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._named = bool(os.environ.get(ADDRESS))
        self._artifacts = None if self._named else runs_dir / "mlflow-artifacts"
        self.address = os.environ.get(ADDRESS) or f"sqlite:///{runs_dir / 'mlflow.db'}"
        self.run: MlflowRun | None = None
        self._outbox: Outbox | None = None

    def open(self, experiment: str, folder: RunFolder, settings: Mapping[str, Any]) -> None:
        """Start the parent run. The address must be in the environment by now.

        Raises InputError when a server that must answer does not.
        """
        name, required = folder.run_id, self._named and is_required()
        try:
            self.run = persist(lambda: MlflowRun.create(experiment, name, name, self._artifacts), START_S)
        except Exception as error:  # MLflow's or the database's own
            if required:
                raise failure_at_start(error) from error
            self._say(f"failed ({reason(error)}); this run is not tracked there")
            return
        record = Record(address=without_password(self.address), name=name, start=name, run_id=self.run.run_id)
        self._outbox = Outbox(folder.path, record, self.run, lambda text: self._warn(f"warning: {text}"))
        self._outbox.put("log_params", settings)
        self._outbox.start()

    def environment(self) -> dict[str, str]:
        """What the steps need to know to track below this run, or that they are not to track."""
        return {PARENT_RUN: self.run.run_id} if self.run else {ADDRESS: ""}

    def cached(self, result: Result) -> None:
        """A step that was taken from the cache gets a run too, with its numbers and a tag."""
        if self._outbox is not None:
            start = f"{self._outbox.record.start}/{result.task}"
            self._outbox.put("log_cached", result.task, start, final_points(result.metrics))

    def close(self, folder: RunFolder, status: str) -> None:
        """Send what the steps could not, keep settings and summary with the run and end it."""
        if self._outbox is None:
            return
        with suppress(Exception):  # what is left is told below
            for left in unsent(folder.path):
                send(left, Record.read(left), 0.0, self._warn)
        self._outbox.put("set_tag", "plumbline.status", status)
        for path in (folder.path / "settings.yaml", folder.summary):
            self._outbox.put("log_artifacts", str(path))
        self._outbox.put("end", END[status])
        why = self._outbox.close(CLOSE_S)
        if lacking := [left.name for left in unsent(folder.path)]:
            because = f" ({why})" if why else ""
            command = f"plumbline track {shown(folder.path)}"
            self._say(f"lacks numbers of {', '.join(lacking)}{because}; when it answers: {command}")

    def place(self) -> str | None:
        """Where the run is to be found; None when there is none."""
        if self.run is None:
            return None
        address = without_password(self.address)
        if address.startswith("http"):
            return f"{address}/#/experiments/{self.run.experiment_id}/runs/{self.run.run_id}"
        return f"run {self.run.run_id}; mlflow ui --backend-store-uri {address}"

    def _say(self, what: str) -> None:
        self._warn(f"warning: MLflow at {without_password(self.address)} {what}")


def unsent(folder: Path) -> list[Path]:
    """The folders that hold something MLflow lacks: those of a run's steps, then its own; or that of one step."""
    steps = sorted(path.parent for path in folder.glob(f"*/{UNSENT_FILE}"))
    return [*steps, *([folder] if (folder / UNSENT_FILE).is_file() else [])]


def send_unsent(folder: Path, say: Callable[[str], None]) -> None:
    """Tell MLflow what it lacks of a run, or of a step whose folder this is, and say of what it was.

    Raises InputError when the folder is none, or MLflow does not answer or refuses.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Give that of a run, such as runs/latest, or of a step.")
    left = unsent(folder)
    for place in left:
        record = Record.read(place)
        with environment({ADDRESS: os.environ.get(ADDRESS) or record.address}):
            try:
                run_id = send(place, record, START_S, say)
            except Exception as error:  # MLflow's or the database's own
                raise failure(error) from error
        say(f"{place}: run {run_id} has everything now")
    if not left:
        say(f"{folder}: nothing is left to send")
