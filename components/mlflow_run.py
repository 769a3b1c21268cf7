"""A run in MLflow: params, metrics in batches, artifacts, tags, runs below it; loads MLflow when one is made.

Whatever is told a run may be told again: it changes nothing. So that making a run can be repeated too, after an
answer that got lost, a run is tagged with its start, a name that no other has, and is looked for by it first.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from components.mlflow_server import client as mlflow_client
from components.parsing import flattened

PARENT_TAG = "mlflow.parentRunId"
START_TAG = "plumbline.start"
CACHED_TAG = "plumbline.cached"
MAX_PARAM = 500  # characters that every MLflow store accepts as a value
MAX_PARAMS = 100  # params in one batch, MLflow's limit
MAX_BATCH = 1000  # metrics in one batch, MLflow's limit
Point = tuple[str, float, int, int]
"""A metric's name, value, time in milliseconds since 1970, and update."""


class MlflowRun:
    """One run in MLflow, written to in batches."""

    def __init__(self, client: Any, run_id: str, experiment_id: str) -> None:
        self.client, self.run_id, self.experiment_id = client, run_id, experiment_id

    @classmethod
    def attach(cls, run_id: str) -> Self:
        """A run that exists."""
        client = mlflow_client()
        return cls(client, run_id, client.get_run(run_id).info.experiment_id)

    @classmethod
    def create(cls, experiment: str, name: str, start: str, artifacts: Path | None = None) -> Self:
        """The run of this start in an experiment, both made when there is none; `artifacts` is its local file store."""
        client = mlflow_client()
        location = None if artifacts is None else artifacts.absolute().as_uri()
        experiment_id = _experiment_id(client, experiment, location)
        return cls(client, _run_id(client, experiment_id, name, {START_TAG: start}), experiment_id)

    def nested(self, name: str, start: str) -> "MlflowRun":
        """The run of this start below this one, made when there is none."""
        run_id = _run_id(self.client, self.experiment_id, name, {START_TAG: start, PARENT_TAG: self.run_id})
        return MlflowRun(self.client, run_id, self.experiment_id)

    def log_params(self, settings: Mapping[str, Any]) -> None:
        """The settings, one param per dotted key, cut to what MLflow stores."""
        from mlflow.entities import Param

        params = [Param(key, str(value)[:MAX_PARAM]) for key, value in flattened(settings)]
        for start in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(self.run_id, params=params[start : start + MAX_PARAMS])

    def log_metrics(self, points: Sequence[Point]) -> None:
        """Points of metrics; the latest is what MLflow shows as the value."""
        from mlflow.entities import Metric

        for start in range(0, len(points), MAX_BATCH):
            metrics = [Metric(*point) for point in points[start : start + MAX_BATCH]]
            self.client.log_batch(self.run_id, metrics=metrics)

    def log_artifacts(self, path: str, under: str | None = None) -> None:
        """A file, or every file of a folder."""
        log = self.client.log_artifacts if Path(path).is_dir() else self.client.log_artifact
        log(self.run_id, path, under)

    def log_cached(self, name: str, start: str, points: Sequence[Point]) -> None:
        """A finished run below this one, for a step that was taken from the cache with these metrics."""
        nested = self.nested(name, start)
        nested.set_tag(CACHED_TAG, "true")
        nested.log_metrics(points)
        nested.end("FINISHED")

    def set_tag(self, key: str, value: str) -> None:
        """A tag of the run."""
        self.client.set_tag(self.run_id, key, value)

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED, and those of its children that nobody closed."""
        condition = f"tags.`{PARENT_TAG}` = '{self.run_id}' and attributes.status = 'RUNNING'"
        for orphan in self.client.search_runs([self.experiment_id], condition):
            self.client.set_terminated(orphan.info.run_id, "KILLED")
        self.client.set_terminated(self.run_id, status)


def final_points(metrics: Mapping[str, float], update: int = 0, after_s: float = 0.0) -> list[Point]:
    """A step's final numbers at its last update: now, and in any case after what was logged at `after_s`.

    Of two values at the same update and in the same millisecond MLflow would show the larger one.
    """
    at = max(round(time.time() * 1000), round(after_s * 1000) + 1)
    return [(name, float(value), at, update) for name, value in metrics.items()]


def _experiment_id(client: Any, name: str, location: str | None) -> str:
    """The experiment of this name, made when there is none; another process may be doing the same."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    return str(found.experiment_id)


def _run_id(client: Any, experiment_id: str, name: str, tags: Mapping[str, str]) -> str:
    """The run with this start, made when there is none."""
    found = client.search_runs([experiment_id], f"tags.`{START_TAG}` = '{tags[START_TAG]}'", max_results=1)
    run = found[0] if found else client.create_run(experiment_id, run_name=name, tags=dict(tags))
    return str(run.info.run_id)
