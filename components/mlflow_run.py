"""A run in MLflow: params, metrics in batches, artifacts, tags, runs below it; loads MLflow when one is made."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from components.parsing import flattened

PARENT_TAG = "mlflow.parentRunId"
MAX_PARAM = 500  # characters that every MLflow store accepts as a value
MAX_PARAMS = 100  # params in one batch, MLflow's limit
MAX_BATCH = 1000  # metrics in one batch, MLflow's limit


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
    def create(
        cls, experiment: str, name: str, artifacts: Path | None = None, tags: Mapping[str, str] | None = None
    ) -> Self:
        """A new run in an experiment, created when there is none; `artifacts` is its local file store."""
        client = _client()
        location = None if artifacts is None else artifacts.absolute().as_uri()
        experiment_id = _experiment(client, experiment, location)
        made = client.create_run(experiment_id, run_name=name, tags=dict(tags or {}))
        return cls(client, made.info.run_id, experiment_id)

    @classmethod
    def tagged(cls, experiment: str, key: str, value: str) -> list[Self]:
        """The runs of an experiment that have a tag, the oldest first; none where there is no such experiment."""
        client = _client()
        if (held := client.get_experiment_by_name(experiment)) is None:
            return []
        runs = client.search_runs([held.experiment_id], f"tags.`{key}` = '{value}'")
        runs = sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))
        return [cls(client, run.info.run_id, held.experiment_id) for run in runs]

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


def _experiment(client: Any, name: str, location: str | None) -> str:
    """The id of an experiment, which is made when there is none; another task may be faster."""
    from mlflow.exceptions import MlflowException

    if (held := client.get_experiment_by_name(name)) is None:
        try:
            return str(client.create_experiment(name, location))
        except MlflowException:
            if (held := client.get_experiment_by_name(name)) is None:
                raise
    return str(held.experiment_id)


def _client() -> Any:
    """MLflow's client for the address in the environment."""
    import mlflow

    for chatty in ("alembic", "mlflow.store.db.utils"):  # a line per migration of a new database
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return mlflow.MlflowClient()
