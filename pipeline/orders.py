"""From settings to what a cluster is told to run."""

import time
from collections.abc import Iterator
from typing import Any

from components.storage import is_remote
from pipeline.cluster import Cluster, Order
from pipeline.connection import Connection
from pipeline.fingerprints import code_fingerprints
from pipeline.package import compiled
from pipeline.settings import Settings


def announced(connection: Connection, settings: Settings, experiment: str | None) -> tuple[Cluster, Order]:
    """The cluster and what to start there; prints what would be lost there, and the pipeline's version."""
    for line in caveats(settings):
        print(line)
    cluster = Cluster(connection)
    wanted, version = order(cluster, settings, experiment)
    print(version)
    return cluster, wanted


def order(cluster: Cluster, settings: Settings, experiment: str | None = None) -> tuple[Order, str]:
    """What to start, its pipeline version uploaded unless it is there; and a line that says which one it is.

    The code behind every task is in the version, so that Kubeflow's cache sees that it changed; the sources are looked
    at when the run starts. The experiment is called as the settings are unless it is named.
    """
    package = compiled(settings, code_fingerprints(settings))
    pipeline_id, version_id, new = cluster.upload(settings.name, package)
    made = Order(
        name=f"{settings.name} {time.strftime('%Y-%m-%d %H:%M:%S')}",
        experiment_id=cluster.experiment(experiment or settings.name),
        pipeline_id=pipeline_id,
        version_id=version_id,
        parameters=parameters(settings),
    )
    return made, f"pipeline {settings.name}, version {version_id} ({'uploaded' if new else 'there already'})"


def parameters(settings: Settings) -> dict[str, dict[str, Any]]:
    """The whole settings of every task; a part of them would take the place of all."""
    return {task: settings.step(task).model_dump(mode="json", exclude_none=True) for task in settings.tasks()}


def caveats(settings: Settings) -> Iterator[str]:
    """What works on one machine and is lost on a cluster."""
    lost = "is a folder in a task's container, gone when the task ends"
    if not is_remote(settings.upload.registry):
        yield f"warning: upload.registry is {settings.upload.registry}: it {lost}. Set gs://..."
    if settings.deploy.target == "local":
        yield f"warning: deploy.target is local: {settings.deploy.serving_dir} {lost}. Set kserve."
