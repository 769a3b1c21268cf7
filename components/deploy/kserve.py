"""A release as a KServe InferenceService: the manifest, and what it takes to have a cluster run it.

The pod runs our own server on the folder that KServe's storage initializer fetches (for a container that is
called kserve-container and has STORAGE_URI set), so /healthz reports the same digest as everywhere else.
"""

import logging
import time
from typing import Any

from components.cluster import DIGEST_ANNOTATION, GROUP, PLURAL, VERSION, custom_objects, reason_of
from components.deploy.settings import KServe
from components.errors import InputError
from components.release import Release

logger = logging.getLogger(__name__)

MODEL_FOLDER = "/mnt/models"  # where the storage initializer puts what STORAGE_URI names
PORT = 8080
POLL_S = 2.0


def service_name(settings: KServe, release: Release) -> str:
    """The name of the service that serves the release."""
    return settings.service or release.name


def inference_service(settings: KServe, release: Release) -> dict[str, Any]:
    """The InferenceService that serves the release."""
    limits = {"cpu": settings.cpu, "memory": settings.memory}
    if settings.gpus:
        limits["nvidia.com/gpu"] = str(settings.gpus)
    container = {
        "name": "kserve-container",
        "image": settings.image,
        "command": ["plumbline", "serve", "--dir", MODEL_FOLDER, "--host", "0.0.0.0", "--port", str(PORT)],
        "env": [{"name": "STORAGE_URI", "value": release.uri}],
        "ports": [{"name": "http1", "containerPort": PORT, "protocol": "TCP"}],
        "readinessProbe": {"httpGet": {"path": "/healthz", "port": PORT}, "periodSeconds": 5},
        "resources": {"requests": limits, "limits": limits},
    }
    predictor = {"minReplicas": settings.min_replicas, "containers": [container]}
    if settings.service_account:
        predictor["serviceAccountName"] = settings.service_account
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "InferenceService",
        "metadata": {
            "name": service_name(settings, release),
            "namespace": settings.namespace,
            "labels": {
                "app.kubernetes.io/managed-by": "plumbline",
                "app.kubernetes.io/version": release.version,
            },
            "annotations": {DIGEST_ANNOTATION: release.digest},
        },
        "spec": {"predictor": predictor},
    }


def apply(manifest: dict[str, Any], wait_s: float) -> bool:
    """Whether a cluster is configured and has the service now: created, or changed where it existed.

    Raises InputError when the cluster refuses it, RuntimeError when it does not get ready in time.
    """
    from kubernetes.client.exceptions import ApiException

    api = custom_objects()
    if api is None:
        return False
    where = {
        "group": GROUP,
        "version": VERSION,
        "namespace": manifest["metadata"]["namespace"],
        "plural": PLURAL,
    }
    name = manifest["metadata"]["name"]
    try:
        try:
            api.create_namespaced_custom_object(body=manifest, **where)
        except ApiException as error:
            if error.status != 409:
                raise
            api.patch_namespaced_custom_object(name=name, body=manifest, **where)
    except ApiException as error:
        raise InputError(_refusal(error, manifest)) from None
    if wait_s:
        _wait(api, {**where, "name": name}, wait_s)
    return True


def _refusal(error: Any, manifest: dict[str, Any]) -> str:
    """What the cluster's refusal means and what to do about it."""
    namespace = manifest["metadata"]["namespace"]
    hints = {
        403: f"Allow this account to create and patch {PLURAL}.{GROUP} in namespace {namespace}.",
        404: f"Install KServe and create the namespace {namespace}, or set deploy.kserve.namespace.",
        422: "Correct the value under deploy.kserve that it names.",
    }
    hint = hints.get(error.status, "")
    return f"the cluster refused the InferenceService ({error.status}: {reason_of(error)}). {hint}".strip()


def _wait(api: Any, service: dict[str, Any], wait_s: float) -> None:
    """Return when the service is ready in its newest form. Raises RuntimeError when it is late."""
    deadline = time.monotonic() + wait_s
    while True:
        found = api.get_namespaced_custom_object(**service)
        status, generation = found.get("status", {}), found["metadata"].get("generation", 0)
        conditions = status.get("conditions", [])
        seen = status.get("observedGeneration", generation) >= generation
        if seen and any(c["type"] == "Ready" and c["status"] == "True" for c in conditions):
            return
        if time.monotonic() > deadline:
            states = [f"{c['type']} {c['status']} {c.get('message', '')}".strip() for c in conditions]
            raise RuntimeError(
                f"{service['namespace']}/{service['name']} is not ready after {wait_s:.0f} s: "
                f"{'; '.join(states) or 'no condition reported'}"
            )
        time.sleep(POLL_S)
