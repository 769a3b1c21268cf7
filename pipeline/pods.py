"""The names of the pods that ran a step.

The API tells the names of Argo's nodes, `workflow-number`, where the number is a hash of the node's place in the
workflow, and not of pods, `workflow-template-number` (https://github.com/kubeflow/pipelines/issues/14007). The place
follows from the compiled pipeline, as Kubeflow's compiler for Argo lays it out, and with it the pod's name.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from kfp_server_api import V2beta1Run

from pipeline.details import nodes_of

TEMPLATE = "system-container-impl"
"""What Kubeflow calls the template of a step's container; `retry-` stands before it where a step has retries."""
OFFSET, PRIME = 2166136261, 16777619
"""The constants of FNV-1a with 32 bits."""


def pod_names(run: V2beta1Run, spec: Mapping[str, Any], task: str) -> list[str]:
    """The names that the pods of a task can have, the latest attempt first; none before anything was started."""
    children = (child.pod_name for node in nodes_of(run) for child in node.child_tasks or [])
    workflow = next((name.rpartition("-")[0] for name in children if name), "")
    return [
        f"{workflow}-{template}-{fnv1a(f'{workflow}.{place}')}"
        for found, template, place in _places(spec, "root", spec.get("root", {}))
        if found == task and workflow
    ]


def fnv1a(text: str) -> int:
    """The 32-bit FNV-1a hash, by which Argo numbers its nodes."""
    value = OFFSET
    for byte in text.encode():
        value = (value ^ byte) * PRIME % 2**32
    return value


def _places(spec: Mapping[str, Any], above: str, holder: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """For every attempt at a task: the task's name, its template, and its place in the workflow."""
    for key, task in holder.get("dag", {}).get("tasks", {}).items():
        component = spec["components"].get(task["componentRef"]["name"], {})
        name, place = task["taskInfo"]["name"], f"{above}.{key}"
        if "dag" in component:
            yield from _places(spec, place, component)
        elif retries := int(task.get("retryPolicy", {}).get("maxRetryCount", 0)):
            for attempt in reversed(range(retries + 1)):
                yield name, f"retry-{TEMPLATE}", f"{place}.executor({attempt})"
        else:
            yield name, TEMPLATE, f"{place}.executor"
