"""The MLflow run of a whole pipeline: parent of the steps' runs, holder of settings and summary."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from components.mlflow_run import MlflowRun
from components.tracking import PARENT_RUN, without_password
from pipeline.runs import RunFolder
from pipeline.summary import Result

ADDRESS = "MLFLOW_TRACKING_URI"
END = {"succeeded": "FINISHED", "rejected": "FINISHED", "failed": "FAILED"}


def registry_environment(runs_dir: Path) -> dict[str, str]:
    """What a process needs to know to find the runs' own database; nothing when there is none or an address is set."""
    database = runs_dir.absolute() / "mlflow.db"
    return {ADDRESS: f"sqlite:///{database}"} if database.is_file() and not os.environ.get(ADDRESS) else {}


class Ledger:
    """Keeps the books of a run in MLflow. Where MLflow fails, it says so once and the run goes on."""

    def __init__(self, runs_dir: Path, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._artifacts = None if os.environ.get(ADDRESS) else runs_dir / "mlflow-artifacts"
        self.address = os.environ.get(ADDRESS) or f"sqlite:///{runs_dir / 'mlflow.db'}"
        self.run: MlflowRun | None = None

    def open(self, experiment: str, folder: RunFolder, settings: Mapping[str, Any]) -> None:
        """Start the parent run. The address must be in the environment by now."""

        def create() -> None:
            self.run = MlflowRun.create(experiment, folder.run_id, self._artifacts)
            self.run.log_params(settings)

        self._attempt(create)

    def environment(self) -> dict[str, str]:
        """What the steps need to know to track below this run."""
        return {PARENT_RUN: self.run.run_id} if self.run else {}

    def cached(self, result: Result) -> None:
        """A step that was taken from the cache gets a run too, with its numbers and a tag."""

        def write(run: MlflowRun) -> None:
            nested = run.nested(result.task)
            nested.set_tag("plumbline.cached", "true")
            nested.log_final(result.metrics)
            nested.end("FINISHED")

        if self.run is not None:
            run = self.run
            self._attempt(lambda: write(run))

    def close(self, folder: RunFolder, status: str) -> None:
        """Keep settings and summary with the run and end it."""

        def write(run: MlflowRun) -> None:
            run.set_tag("plumbline.status", status)
            run.log_artifacts(folder.path / "settings.yaml")
            run.log_artifacts(folder.summary)
            run.end(END[status])

        if self.run is not None:
            run = self.run
            self._attempt(lambda: write(run))

    def place(self) -> str | None:
        """Where the run is to be found; None when MLflow failed."""
        if self.run is None:
            return None
        address = without_password(self.address)
        if address.startswith("http"):
            return f"{address}/#/experiments/{self.run.experiment_id}/runs/{self.run.run_id}"
        return f"run {self.run.run_id}; mlflow ui --backend-store-uri {address}"

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # tracking must not end a run
            address, reason = without_password(self.address), without_password(error)
            self._warn(f"warning: MLflow at {address} failed ({reason}); this run is not tracked there any more")
            self.run = None
