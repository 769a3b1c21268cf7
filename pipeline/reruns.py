"""A run once more from one of its steps on: what comes before is taken from the cache.

A step's cache key holds its settings, `rerun` among them. A new word there makes the step run again; what follows
it reads other inputs then, and runs again by itself. The same holds where Kubeflow caches and where kfp.local does.
"""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.errors import InputError
from pipeline.cluster import Cluster, Order
from pipeline.documents import read_document
from pipeline.overrides import amend
from pipeline.resources import nodes_of
from pipeline.settings import TASKS, Settings


def settings_again(folder: Path, step: str, overrides: Sequence[str]) -> Settings:
    """The settings for running a local run again from a step on. Raises InputError as `_again` does."""
    path = folder / "settings.yaml"
    return _again(read_document(path), step, overrides, f"in {path}")[1]


def order_again(cluster: Cluster, run_id: str, step: str, overrides: Sequence[str]) -> Order:
    """What to start for running a cluster's run again from a step on: its own version, with other settings.

    Settings of the steps before go back as they came, so that the cache knows them. Raises InputError for a run
    that has no version or is not one of ours, and for settings that would make another pipeline.
    """
    run = cluster.run(run_id)
    version = run.pipeline_version_reference
    if version is None or not version.pipeline_version_id:
        raise InputError(f"run {run_id} was not made from a pipeline version; start it anew with `plumbline submit`.")
    known = cluster.spec(run).get("root", {}).get("inputDefinitions", {}).get("parameters", {})
    given = {name: parameter["defaultValue"] for name, parameter in known.items() if "defaultValue" in parameter}
    given |= (run.runtime_config.parameters if run.runtime_config else None) or {}
    before = {task: given[task] for task in TASKS if task in given}
    if "rl" not in before:
        raise InputError(f"run {run_id} is no run of plumbline's: it has no parameter rl.")
    tree, settings = _again(before, step, overrides, f"in run {run_id}")
    _, was = amend(before, (), f"in run {run_id}")
    if (settings.tasks(), settings.rl.teachers) != (was.tasks(), was.rl.teachers):
        raise InputError(
            f"rl.algorithm.name is {settings.rl.algorithm.name!r}, which learns from other models than "
            f"{was.rl.algorithm.name!r} does: that is another pipeline. Start it with `plumbline submit`."
        )
    for task in settings.tasks():
        if (nodes := nodes_of(settings, task)).number > 1 and f"{task}_gpus" in known:
            raise InputError(
                f"{nodes.key} is {nodes.number}, and run {run_id} was compiled with 1, so that {task} has one pod with "
                "its GPUs: that is another pipeline. Start it with `plumbline submit`."
            )
    name = f"{run.display_name} from {step}"
    ids = (run.experiment_id, version.pipeline_id, version.pipeline_version_id)
    root = run.runtime_config.pipeline_root if run.runtime_config else None
    return Order(name, *ids, given | tree, root, run.service_account or None)


def _again(
    before: Mapping[str, Any], step: str, overrides: Sequence[str], where: str
) -> tuple[dict[str, Any], Settings]:
    """The values of a run with the overrides, and a new word for the step; and the settings they make.

    Raises InputError for a step that the run has not, and for a setting of anything before it.
    """
    _, settings = amend(before, (), where)
    tasks = settings.tasks()
    if step not in tasks:
        raise InputError(f"--step is {step!r}; accepted, of the run's steps: {', '.join(tasks)}.")
    open_ = tasks[tasks.index(step) :]
    for override in overrides:
        if override.partition("=")[0].partition(".")[0] not in open_:
            raise InputError(
                f"{override}: with --step {step}, settings of {', '.join(open_)} can change. Name an earlier step, or "
                "start a run of its own."
            )
    return amend(before, [*overrides, f"{step}.rerun={secrets.token_hex(4)!r}"], where)
