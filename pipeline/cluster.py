"""What a Kubeflow Pipelines cluster is asked for: versions of a pipeline, runs of them, and runs on a schedule.

Everything goes over kfp's client to the v2beta1 API. In an installation with several users the namespace goes
with what belongs to one of them; in one without, the API wants none.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp_server_api import (
    ApiException,
    RecurringRunMode,
    V2beta1Experiment,
    V2beta1Pipeline,
    V2beta1PipelineVersionReference,
    V2beta1RecurringRun,
    V2beta1Run,
    V2beta1RuntimeConfig,
    V2beta1Trigger,
)

from components.errors import InputError
from pipeline.connection import Connection

PAGE = 100
VERSION_DIGITS = 12
CONFLICT = 409
Parameters = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Order:
    """What to run: a version of a pipeline, and the settings of its tasks."""

    name: str
    """How the run is called."""
    experiment_id: str
    pipeline_id: str
    version_id: str
    parameters: Parameters
    """The whole settings of every task: a value takes the place of the version's own, which is not looked into."""
    pipeline_root: str | None = None
    service_account: str | None = None

    def fields(self) -> dict[str, Any]:
        """What runs and schedules have in common, as the API's models take it."""
        return {
            "display_name": self.name,
            "experiment_id": self.experiment_id,
            "pipeline_version_reference": V2beta1PipelineVersionReference(self.pipeline_id, self.version_id),
            "runtime_config": V2beta1RuntimeConfig(dict(self.parameters), self.pipeline_root),
            "service_account": self.service_account,
        }


class Cluster:
    """A Kubeflow Pipelines API. Every method raises InputError for what the API refuses."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.client, several = connection.open()
        self._namespace = connection.namespace if several else None

    def experiment(self, name: str) -> str:
        """The id of the experiment of that name, which is made when there is none."""
        experiments = self.client.experiments
        for found in self._all(
            experiments.experiment_service_list_experiments, "experiments", filter=_named(name), **self._owned()
        ):
            return str(found.experiment_id)
        with self.connection.asking():
            wanted = V2beta1Experiment(display_name=name, namespace=self._namespace)
            return str(experiments.experiment_service_create_experiment(wanted).experiment_id)

    def upload(self, name: str, package: str) -> tuple[str, str, bool]:
        """The ids of the pipeline and of its version with this content, and whether it is new there.

        A version is named by the digest of its content: the same content again is the same version.
        """
        pipeline_id = self._pipeline(name)
        version = f"{name}-{hashlib.sha256(package.encode()).hexdigest()[:VERSION_DIGITS]}"
        if known := self._version(pipeline_id, version):
            return pipeline_id, known, False
        with tempfile.TemporaryDirectory(prefix="plumbline-") as scratch, self.connection.asking():
            path = Path(scratch) / "pipeline.yaml"
            path.write_text(package, encoding="utf-8")
            try:
                made = self.client.pipeline_uploads.upload_pipeline_version(
                    str(path), name=version, pipelineid=pipeline_id
                )
            except ApiException as error:
                known = self._version(pipeline_id, version) if error.status == CONFLICT else None
                if known is None:
                    raise
                return pipeline_id, known, False  # somebody else was quicker
        return pipeline_id, str(made.pipeline_version_id), True

    def start(self, order: Order) -> str:
        """The id of a new run."""
        with self.connection.asking():
            return str(self.client.runs.run_service_create_run(V2beta1Run(**order.fields())).run_id)

    def run(self, run_id: str) -> V2beta1Run:
        """A run as it is now."""
        missing = f"{self.connection.host} has no run {run_id}; accepted: the id that submit printed."
        with self.connection.asking(missing):
            return self.client.runs.run_service_get_run(run_id)

    def spec(self, run: V2beta1Run) -> dict[str, Any]:
        """The compiled pipeline of a run."""
        found, reference = run.pipeline_spec, run.pipeline_version_reference
        if found is None and reference is not None:
            missing = f"run {run.run_id}: its version {reference.pipeline_version_id} was deleted; submit again."
            with self.connection.asking(missing):
                found = self.client.pipelines.pipeline_service_get_pipeline_version(
                    reference.pipeline_id, reference.pipeline_version_id
                ).pipeline_spec
        return dict((found or {}).get("pipeline_spec", found or {}))

    def pod_log(self, run_id: str, pod: str) -> str | None:
        """What a pod of a run printed; None where the host has no logs, or not this one."""
        ask = self.client.runs.api_client.call_api
        named = {"run": run_id, "pod": pod}
        query = [("podname", pod), ("podnamespace", self.connection.namespace or "")]
        for path, place in (("/apis/v1alpha1/runs/{run}/nodes/{pod}/log", (named, [])), ("/k8s/pod/logs", ({}, query))):
            try:
                with self.connection.asking("no log"):
                    answer = ask(path, "GET", *place, auth_settings=["Bearer"], _preload_content=False)
            except InputError:  # of another pod, or a host that knows no such address
                continue
            if answer.headers.get("content-type", "").startswith("text/plain"):  # and is no page
                return str(answer.data.decode("utf-8", errors="replace"))
        return None

    def schedule(self, order: Order, trigger: V2beta1Trigger, max_concurrency: int, catch_up: bool) -> str:
        """The id of a new schedule."""
        wanted = V2beta1RecurringRun(
            **order.fields(),
            trigger=trigger,
            max_concurrency=str(max_concurrency),
            no_catchup=not catch_up,
            mode=RecurringRunMode.ENABLE,
        )
        with self.connection.asking():
            made = self.client.recurring_runs.recurring_run_service_create_recurring_run(wanted)
            return str(made.recurring_run_id)

    def schedules(self) -> list[V2beta1RecurringRun]:
        """All schedules, in the API's order."""
        service = self.client.recurring_runs.recurring_run_service_list_recurring_runs
        return list(self._all(service, "recurring_runs", **self._owned()))

    def change(self, schedule_id: str, action: str) -> None:
        """Make the API `enable`, `disable` or `delete` a schedule."""
        service = getattr(self.client.recurring_runs, f"recurring_run_service_{action}_recurring_run")
        with self.connection.asking(f"{self.connection.host} has no schedule {schedule_id}."):
            service(schedule_id)

    def page(self, run_id: str) -> str:
        """The address of a run's page."""
        return f"{str(self.connection.host).rstrip('/')}/#/runs/details/{run_id}"

    def _pipeline(self, name: str) -> str:
        """The id of the pipeline of that name, which is made when there is none."""
        pipelines = self.client.pipelines
        for found in self._all(
            pipelines.pipeline_service_list_pipelines, "pipelines", filter=_named(name), **self._owned()
        ):
            return str(found.pipeline_id)
        with self.connection.asking():
            wanted = V2beta1Pipeline(display_name=name, namespace=self._namespace)
            return str(pipelines.pipeline_service_create_pipeline(wanted).pipeline_id)

    def _version(self, pipeline_id: str, name: str) -> str | None:
        """The id of a pipeline's version of that name; None when there is none."""
        service = self.client.pipelines.pipeline_service_list_pipeline_versions
        for found in self._all(service, "pipeline_versions", pipeline_id=pipeline_id, filter=_named(name)):
            return str(found.pipeline_version_id)
        return None

    def _owned(self) -> dict[str, str]:
        """What narrows a list to the user's own."""
        return {"namespace": self._namespace} if self._namespace else {}

    def _all(self, service: Callable[..., Any], field: str, **query: Any) -> Iterator[Any]:
        """Everything in a list, page after page."""
        token = ""
        while True:
            with self.connection.asking():
                page = service(page_token=token, page_size=PAGE, **query)
            yield from getattr(page, field) or []
            token = page.next_page_token
            if not token:
                return


def _named(name: str) -> str:
    """The filter for what has this name."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "string_value": name}]})
