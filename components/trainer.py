"""A step on several machines: a TrainJob is created, followed and deleted; this process stays and watches.

Each process of it leaves word of how it ended in the place through which inputs and results pass (`exchange`): the
first to fail is the step's failure.
"""

import logging
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from components import termination
from components.cluster import TIMEOUT_S, custom_objects, reason_of
from components.errors import InputError, TrainingFailure
from components.exchange import held
from components.processes import Job, endings, raise_first
from components.trainjob import CONTAINER, GROUP, NODES, PLURAL, VERSION, asked_of, train_job

logger = logging.getLogger(__name__)

POLL_S, PATIENCE_S = 5.0, 600.0
"""Seconds between two looks at the TrainJob, and for which the cluster may be out of reach."""


def run(job: Job, nodes: int, processes: int) -> None:
    """Run the job on so many nodes with so many processes each; its output and metrics are then where it says.

    Of a job that failed the metrics are.

    Raises InputError where there is no cluster or it refuses, else as `raise_first`. SIGTERM deletes the TrainJob,
    whose processes then have the pods' time to write a checkpoint.
    """
    asked, api = asked_of(nodes), custom_objects()
    if api is None:
        raise InputError(f"compute.nodes is {nodes}: a TrainJob needs a cluster, and none is configured. Set it to 1.")
    name = f"{job.task}-{uuid.uuid4().hex[:8]}"
    place = f"{asked.exchange.rstrip('/')}/{name}"
    with termination.watch() as watch, held(job, place, watch) as there:
        manifest = train_job(asked, name, there, nodes, processes)
        with _created(api, manifest):
            fine = _follow(api, manifest, watch)
        raise_first(endings(f"{place}/endings", nodes * processes), nodes * processes, fine, watch.requested)


def _where(manifest: dict[str, Any]) -> dict[str, str]:
    return {"group": GROUP, "version": VERSION, "namespace": manifest["metadata"]["namespace"], "plural": PLURAL}


@contextmanager
def _created(api: Any, manifest: dict[str, Any]) -> Iterator[None]:
    """The TrainJob while the block runs, however that ends. Raises InputError when the cluster refuses it."""
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    where, name = _where(manifest), manifest["metadata"]["name"]
    try:
        api.create_namespaced_custom_object(body=manifest, _request_timeout=TIMEOUT_S, **where)
    except ApiException as error:
        hints = {
            403: f"Allow this account to create and delete {PLURAL}.{GROUP}, and to read pods and their logs.",
            404: f"Install Kubeflow Trainer, or create the namespace {where['namespace']}.",
            422: f"Correct the value in {NODES} that it names.",
        }
        hint, refused = hints.get(error.status, ""), f"{error.status}: {reason_of(error)}"
        raise InputError(f"the cluster refused the TrainJob ({refused}). {hint}".strip()) from None
    logger.info("TrainJob %s/%s is made", where["namespace"], name)
    try:
        yield
    finally:
        with suppress(ApiException, HTTPError):  # it is gone, or Kubernetes removes it with this pod's namespace
            api.delete_namespaced_custom_object(
                name=name, propagation_policy="Foreground", _request_timeout=TIMEOUT_S, **where
            )


def _follow(api: Any, manifest: dict[str, Any], watch: termination.Watch) -> bool:
    """Whether the TrainJob completed; its pods' logs are printed meanwhile. False as soon as a stop is asked for."""
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    name, logs, seen = manifest["metadata"]["name"], _Logs(manifest), time.monotonic()
    while not watch.requested:
        try:
            found = api.get_namespaced_custom_object(name=name, _request_timeout=TIMEOUT_S, **_where(manifest))
            logs.follow()
            seen = time.monotonic()
        except (ApiException, HTTPError) as error:
            if getattr(error, "status", None) == 404:
                raise TrainingFailure(f"TrainJob {name} was deleted while it ran. Start again.") from None
            if time.monotonic() - seen > PATIENCE_S:
                raise TrainingFailure(f"the cluster does not show TrainJob {name} any more ({error}).") from None
            found = {}
        holding = {c["type"] for c in found.get("status", {}).get("conditions", []) if c["status"] == "True"}
        if holding & {"Complete", "Failed"}:
            logs.close()
            return "Complete" in holding
        time.sleep(POLL_S)
    return False


class _Logs:
    """The logs of a TrainJob's pods, printed as they come."""

    def __init__(self, manifest: dict[str, Any]) -> None:
        from kubernetes import client

        self.core, self.namespace = client.CoreV1Api(), manifest["metadata"]["namespace"]
        self.selector = f"jobset.sigs.k8s.io/jobset-name={manifest['metadata']['name']}"
        self.threads: dict[str, threading.Thread] = {}

    def follow(self) -> None:
        """Begin to print what the pods say that have started since the last call."""
        pods = self.core.list_namespaced_pod(
            self.namespace, label_selector=self.selector, _request_timeout=TIMEOUT_S
        )
        for pod in pods.items:
            if pod.metadata.name not in self.threads and pod.status.phase != "Pending":
                thread = threading.Thread(target=self._print, args=(pod.metadata.name,), daemon=True)
                self.threads[pod.metadata.name] = thread
                thread.start()

    def close(self) -> None:
        """Wait a little for the last words."""
        for thread in self.threads.values():
            thread.join(timeout=TIMEOUT_S)

    def _print(self, pod: str) -> None:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            lines = self.core.read_namespaced_pod_log(
                pod, self.namespace, container=CONTAINER, follow=True, _preload_content=False
            )
            for line in lines:
                sys.stdout.write(line.decode("utf-8", errors="replace"))
                sys.stdout.flush()
        except (ApiException, HTTPError) as error:
            logger.warning("the log of pod %s cannot be read: %s", pod, error)
