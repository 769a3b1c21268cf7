"""How Kubeflow goes through a compiled pipeline, without executing anything: which tasks run, and which are cached.

The cache key is made of what Kubeflow's is made of (backend/src/v2/cacheutils): the values of a task's parameters,
the identities of its input artifacts, and its container. An artifact that is made anew has a new identity.
"""

import itertools
import json
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

WORKFLOW = "plumbline-x7k2p"


class Engine:
    """A cluster's cache, and the artifacts it has made."""

    def __init__(self) -> None:
        self._cache: dict[str, dict[str, Any]] = {}
        self._ids = itertools.count(1)

    def execute(
        self,
        spec: Mapping[str, Any],
        parameters: Mapping[str, Any],
        *,
        passes: bool = True,
        fails: Collection[str] = (),
        outputs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> dict[str, str]:
        """Go through a pipeline; for every task, by its display name: ran, cached, failed or skipped.

        The gate passes or not, tasks in `fails` fail, and `outputs` are the parameters that tasks give, by task.
        """
        known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
        given = {name: parameter.get("defaultValue") for name, parameter in known.items()} | dict(parameters)
        self.passes, self.fails, self.outputs, self.spec = passes, fails, outputs or {}, spec
        return dict(self._dag(spec["root"]["dag"], given, {}))

    def _dag(self, dag: Any, parameters: Mapping[str, Any], artifacts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        made: dict[str, dict[str, Any] | None] = {}
        for key in _ordered(dag["tasks"]):
            task = dag["tasks"][key]
            component = self.spec["components"][task["componentRef"]["name"]]
            stuck = any(made[other] is None for other in task.get("dependentTasks", []))
            inputs = {} if stuck else self._inputs(task, parameters, artifacts, made)
            name = task["taskInfo"]["name"]
            if "dag" in component:
                if stuck or ("condition" in task.get("triggerPolicy", {}) and not self.passes):
                    yield from _skipped(self.spec, component)
                else:
                    yield from self._dag(component["dag"], inputs["parameters"], inputs["artifacts"])
                made[key] = {}
                continue
            made[key], how = (None, "skipped") if stuck else self._run(name, task, component, inputs)
            yield name, how

    def _run(self, name: str, task: Any, component: Any, inputs: Any) -> tuple[dict[str, Any] | None, str]:
        container = self.spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        what = {k: container.get(k) for k in ("image", "command", "args", "env")}
        key = json.dumps([inputs, what, component.get("outputDefinitions")], sort_keys=True)
        cached = task.get("cachingOptions", {}).get("enableCache") and key in self._cache
        if cached:
            return self._cache[key], "cached"
        if name in self.fails:
            return None, "failed"
        definitions = component.get("outputDefinitions", {})
        made = {output: f"artifact-{next(self._ids)}" for output in definitions.get("artifacts", {})}
        values = {output: f"{name}-{output}" for output in definitions.get("parameters", {})}
        self._cache[key] = {**made, **values, **self.outputs.get(name, {})}
        return self._cache[key], "ran"

    def _inputs(self, task: Any, parameters: Any, artifacts: Any, made: Any) -> dict[str, dict[str, Any]]:
        """The values and the identities that a task reads."""
        found: dict[str, dict[str, Any]] = {"parameters": {}, "artifacts": {}}
        for name, source in task.get("inputs", {}).get("parameters", {}).items():
            match source:
                case {"componentInputParameter": above}:
                    found["parameters"][name] = parameters[above]
                case {"runtimeValue": {"constant": value}}:
                    found["parameters"][name] = value
                case {"taskOutputParameter": {"producerTask": other, "outputParameterKey": key}}:
                    found["parameters"][name] = made[other][key]
        for name, source in task.get("inputs", {}).get("artifacts", {}).items():
            match source:
                case {"componentInputArtifact": above}:
                    found["artifacts"][name] = artifacts[above]
                case {"taskOutputArtifact": {"producerTask": other, "outputArtifactKey": key}}:
                    found["artifacts"][name] = made[other][key]
        return found


def nodes(spec: Mapping[str, Any], run_id: str, done: Mapping[str, str]) -> list[dict[str, Any]]:
    """The nodes that the API tells of a run: a driver and a holder per task, and the executor below that."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    times = {"start_time": start.isoformat(), "end_time": (start + timedelta(seconds=90)).isoformat()}
    found = []
    for key, name in _keys(spec):
        how = done.get(name, "skipped")
        if how == "skipped":
            continue
        state = {"ran": "SUCCEEDED", "cached": "SUCCEEDED", "failed": "FAILED", "running": "RUNNING"}[how]
        below = {"child_tasks": [{"pod_name": f"{WORKFLOW}-1234567"}]}
        for label, its_state, more in (
            (f"{key}-driver", "SUCCEEDED", {}),
            (key, state, below),
            ("executor", "SKIPPED" if how == "cached" else state, {}),
        ):
            found.append({"run_id": run_id, "display_name": label, "state": its_state, **times, **more})
    return found


def _keys(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every task by its name in the compiled pipeline, with its display name."""
    for holder in (spec["root"], *spec["components"].values()):
        for key, task in holder.get("dag", {}).get("tasks", {}).items():
            if "dag" not in spec["components"][task["componentRef"]["name"]]:
                yield key, task["taskInfo"]["name"]


def _ordered(tasks: Mapping[str, Any]) -> list[str]:
    """The tasks so that each comes after those it depends on."""
    placed: list[str] = []
    while len(placed) < len(tasks):
        ready = [k for k, t in tasks.items() if k not in placed and set(t.get("dependentTasks", [])) <= set(placed)]
        assert ready
        placed += ready
    return placed


def _skipped(spec: Mapping[str, Any], component: Any) -> Iterator[tuple[str, str]]:
    for task in component["dag"]["tasks"].values():
        below = spec["components"][task["componentRef"]["name"]]
        if "dag" in below:
            yield from _skipped(spec, below)
        else:
            yield task["taskInfo"]["name"], "skipped"
