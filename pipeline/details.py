"""What the API tells of a run's tasks, as the results that a local run has.

The API lists a run's nodes, not its tasks: for a task `reward-2` of the compiled pipeline, which people see as
`cost`, there are `reward-2-driver`, `reward-2` and an `executor` below it. The compiled pipeline says which task
is which. Numbers are not among the details.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from kfp_server_api import V2beta1Run

from pipeline.settings import NOTIFY, SOURCES, TASKS
from pipeline.summary import Result, Status

STATUS: Mapping[str, Status] = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "PAUSED": "running",
    "SUCCEEDED": "succeeded",
    "SKIPPED": "skipped",
    "FAILED": "failed",
    "CANCELING": "failed",
    "CANCELED": "failed",
}
FINISHED = {"SUCCEEDED": "succeeded", "SKIPPED": "failed", "FAILED": "failed", "CANCELED": "canceled"}
"""The states in which a run stays, and what that is called."""
ORDER = (SOURCES, *TASKS, NOTIFY)
"""The tasks as they follow each other."""
GATED = ("evaluate", "upload")
"""The task whose gate decides, and the first one behind it."""


def task_names(spec: Mapping[str, Any]) -> dict[str, str]:
    """What people call each task of a compiled pipeline, by its name there; conditions are no tasks."""
    components = spec.get("components", {})
    return {
        key: task.get("taskInfo", {}).get("name", key)
        for dag in _dags(spec)
        for key, task in dag["tasks"].items()
        if "dag" not in components.get(task.get("componentRef", {}).get("name"), {})
    }


def results(run: V2beta1Run, spec: Mapping[str, Any]) -> list[Result]:
    """How the tasks of a run are, in order; tasks that are not ours come last."""
    nodes = {node.display_name: node for node in nodes_of(run)}
    named = {name: _result(name, key, nodes, run) for key, name in task_names(spec).items()}
    return [named.pop(name) for name in ORDER if name in named] + list(named.values())


def status(run: V2beta1Run, tasks: Sequence[Result]) -> str:
    """succeeded, failed, canceled, rejected when the gate let nothing pass, or running."""
    ended = FINISHED.get(str(run.state), "running")
    decided, gated = ({result.status for result in tasks if result.task == task} for task in GATED)
    passed_on = gated != {"skipped"} or not decided & {"succeeded", "cached"}
    return "rejected" if ended == "succeeded" and not passed_on else ended


def seconds(run: V2beta1Run) -> float:
    """How long a run has taken, up to now when it has not ended."""
    return _between(run.created_at, run.finished_at if run.state in FINISHED else None)


def nodes_of(run: V2beta1Run) -> Sequence[Any]:
    """The nodes of a run that the API has recorded, if any yet."""
    return (run.run_details.task_details if run.run_details else None) or []


def _result(name: str, key: str, nodes: Mapping[str, Any], run: V2beta1Run) -> Result:
    """How one task is, from its node or, when it did not get that far, its driver's."""
    driver = nodes.get(f"{key}-driver")
    node = driver if driver is not None and driver.state == "FAILED" else nodes.get(key)
    if node is None:
        return Result(name, "skipped" if run.state in FINISHED else "waiting")
    error = node.error.message if node.error and node.error.message else ""
    return Result(name, STATUS.get(str(node.state), "waiting"), _between(node.start_time, node.end_time), error=error)


def _dags(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The pipeline's own tasks, and those behind its conditions."""
    for holder in (spec.get("root", {}), *spec.get("components", {}).values()):
        if "dag" in holder:
            yield holder["dag"]


def _between(start: datetime | None, end: datetime | None) -> float:
    """Seconds from one time to another, up to now without an end; the API writes 1970 where it means no time."""
    if start is None or start.timestamp() <= 0:
        return 0.0
    until = end if end is not None and end.timestamp() > 0 else datetime.now(UTC)
    return max((until - start).total_seconds(), 0.0)
