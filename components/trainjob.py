"""A Kubeflow TrainJob whose pods run a step's processes: what it is, as data.

What it needs that no setting of the step says is in the environment, as JSON: `Nodes`. A compiled pipeline sets it
on its tasks with several nodes.
"""

import json
import os
from pathlib import Path
from typing import Any

from pydantic import Field

from components.errors import InputError
from components.parsing import parse
from components.processes import ENDINGS, GRACE_S, JOB, Job
from components.settings import Group

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
NODES = "PLUMBLINE_TRAINJOB"
"""The variable with the pods' hardware, image, exchange and secrets; a step that has it runs in pods of its own."""
CHECKPOINTS = "PLUMBLINE_CHECKPOINTS"
ACCOUNT = "PLUMBLINE_SERVICE_ACCOUNT"
"""The variable with the account of this task's own pod."""
HANDED_ON = {
    CHECKPOINTS, "PLUMBLINE_FINGERPRINT", "PLUMBLINE_MLFLOW", "PLUMBLINE_PARENT_RUN", "PLUMBLINE_PIPELINE_RUN",
}  # fmt: skip
"""Variables of this task that the pods have too, beside MLflow's."""
HIDDEN = ("PASSWORD", "TOKEN")
"""MLflow's variables that end so are secrets: they reach the pods as such, and no manifest shows them."""
USER = 10001
"""The user of our images."""
OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
CONTAINER = "node"
"""The name of the training runtime's job and of the container in its pods."""


class PodSecret(Group):
    """A secret that lies in the pods' namespace, as variables or as files."""

    name: str = Field(min_length=1)
    """Its name in Kubernetes."""
    env: dict[str, str] = Field({})
    """The variable for each of its keys."""
    mount: str = ""
    """The folder in which each of its keys is a file; empty for none."""


class Nodes(Group):
    """What the pods of a TrainJob are."""

    image: str = Field(min_length=1)
    """The image that trains."""
    exchange: str = Field(min_length=1)
    """A bucket's folder (gs://...), or a folder that this pod and those of the job have under the same path."""
    namespace: str = ""
    """Where the TrainJob is made; empty takes the namespace of this pod."""
    runtime: str = "torch-distributed"
    """The ClusterTrainingRuntime, which starts torchrun's processes on every node."""
    gpus: int = Field(0, ge=0)
    """GPUs of each pod."""
    gpu_type: str = "nvidia.com/gpu"
    """What the cluster calls them."""
    cpu: str = ""
    """CPU cores of each pod, as Kubernetes writes them; empty limits nothing."""
    memory: str = ""
    """Memory of each pod, as Kubernetes writes it; empty limits nothing."""
    shm: str = ""
    """Size of /dev/shm, through which nccl talks within a pod; empty keeps the cluster's 64 MiB."""
    node_selector: dict[str, str] = Field({})
    """Labels that the machines must have."""
    tolerations: tuple[dict[str, Any], ...] = ()
    """Taints that the pods put up with."""
    service_account: str = ""
    """The account that may read and write the exchange; empty takes that of this pod, where it knows it."""
    variables: tuple[str, ...] = ()
    """Variables of this task, by name, that the pods have too."""
    secrets: tuple[PodSecret, ...] = ()
    """Secrets that the pods get."""
    image_pull_secrets: tuple[str, ...] = ()
    """Secrets with which the image is fetched, by name."""


def asked_of(nodes: int) -> Nodes:
    """What the environment says of the pods. Raises InputError where it says nothing, or what cannot be."""
    text = os.environ.get(NODES)
    if not text:
        raise InputError(
            f"compute.nodes is {nodes} and {NODES} is not set: a pipeline that was compiled with compute.nodes above 1 "
            "sets it, a run of another one cannot raise compute.nodes. Submit the settings anew, or set it to 1."
        )
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InputError(f"{NODES} is no JSON: {error}.") from None
    return parse(Nodes, values, prefix=(NODES,))


def train_job(asked: Nodes, name: str, job: Job, nodes: int, processes: int) -> dict[str, Any]:
    """The TrainJob that runs the job."""
    limits = {asked.gpu_type: str(asked.gpus)} if asked.gpus else {}
    limits |= {resource: amount for resource, amount in (("cpu", asked.cpu), ("memory", asked.memory)) if amount}
    trainer = {
        "image": asked.image,
        "command": ["torchrun", "--max-restarts=0", f"--shutdown-timeout={GRACE_S}", "-m", "components.launch"],
        "numNodes": nodes,
        "numProcPerNode": processes,
        "env": _environment(asked, job),
    }
    if limits:
        trainer["resourcesPerNode"] = {"requests": limits, "limits": limits}
    job_template = {"name": CONTAINER, "template": {"spec": {"template": _pod(asked)}}}
    runtime = {"template": {"spec": {"replicatedJobs": [job_template]}}}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": name,
            "namespace": asked.namespace or _own_namespace(),
            "labels": {"app.kubernetes.io/managed-by": "plumbline"},
        },
        "spec": {
            "runtimeRef": {"name": asked.runtime},
            "trainer": trainer,
            "runtimePatches": [{"manager": "plumbline", "trainingRuntimeSpec": runtime}],
        },
    }


def _environment(asked: Nodes, job: Job) -> list[dict[str, Any]]:
    """The pods' variables: the job, what they have from this task, and keys of secrets by name."""
    keys = [(secret.name, key, name) for secret in asked.secrets for key, name in secret.env.items()]
    given, names = HANDED_ON | set(asked.variables), os.environ.keys()
    given |= {name for name in names if name.startswith("MLFLOW_") and not name.endswith(HIDDEN)}
    given -= {name for _, _, name in keys}
    plain = {JOB: job.written(), ENDINGS: f"{job.exchange}/endings"}
    plain |= {CHECKPOINTS: f"{asked.exchange.rstrip('/')}/checkpoints"}  # no pod's own disk outlives it
    plain |= {name: os.environ[name] for name in sorted(given) if name in os.environ}
    return [{"name": name, "value": value} for name, value in plain.items()] + [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}} for secret, key, name in keys
    ]


def _pod(asked: Nodes) -> dict[str, Any]:
    """What is changed of the runtime's pods; Istio's proxy is left out: torchrun's processes do not talk through it."""
    pod: dict[str, Any] = {"securityContext": {"runAsUser": USER, "runAsNonRoot": True}}
    if asked.node_selector:
        pod["nodeSelector"] = asked.node_selector
    if asked.tolerations:
        pod["tolerations"] = list(asked.tolerations)
    if account := asked.service_account or os.environ.get(ACCOUNT):
        pod["serviceAccountName"] = account
    if asked.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in asked.image_pull_secrets]
    memory = [("/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": asked.shm}})] if asked.shm else []
    files = [(secret.mount, {"secret": {"secretName": secret.name}}) for secret in asked.secrets if secret.mount]
    if volumes := [(f"plumbline-{number}", *volume) for number, volume in enumerate(memory + files)]:
        pod["volumes"] = [{"name": name, **source} for name, _, source in volumes]
        mounts = [{"name": name, "mountPath": place} for name, place, _ in volumes]
        pod["containers"] = [{"name": CONTAINER, "volumeMounts": mounts}]
    return {"metadata": {"labels": {"sidecar.istio.io/inject": "false"}}, "spec": pod}


def _own_namespace() -> str:
    try:
        return OWN_NAMESPACE.read_text("utf-8").strip()
    except OSError:
        raise InputError(f"{NODES}.namespace is empty, and this process is in no pod. Name the namespace.") from None
