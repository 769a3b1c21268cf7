"""A Kubeflow TrainJob whose pods run a step's processes: what it is, as data.

What it needs that no setting of the step says is in the environment, as JSON: `Nodes`.
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
"""The variable with the pods' hardware, image and exchange."""
CHECKPOINTS = "PLUMBLINE_CHECKPOINTS"
HANDED_ON = (
    CHECKPOINTS, "PLUMBLINE_FINGERPRINT", "PLUMBLINE_PARENT_RUN", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_WORKSPACE",
)  # fmt: skip
"""Variables of this task that the pods have too; secrets are not among them."""
OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
CONTAINER = "node"
"""The name of the training runtime's job and of the container in its pods."""


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
    """The account that may read and write the exchange; empty takes the namespace's default."""


def asked_of(nodes: int) -> Nodes:
    """What the environment says of the pods. Raises InputError where it says nothing, or what cannot be."""
    text = os.environ.get(NODES)
    if not text:
        raise InputError(
            f"compute.nodes is {nodes} and {NODES} is not set: it says as JSON what the pods are, at least "
            '{"image": "...", "exchange": "gs://..."}. Set it in the task\'s environment, or compute.nodes to 1.'
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
    variables = {JOB: job.written(), ENDINGS: f"{job.exchange}/endings"}
    variables |= {CHECKPOINTS: f"{asked.exchange.rstrip('/')}/checkpoints"}  # no pod's own disk outlives it
    variables |= {variable: os.environ[variable] for variable in HANDED_ON if variable in os.environ}
    trainer = {
        "image": asked.image,
        "command": ["torchrun", "--max-restarts=0", f"--shutdown-timeout={GRACE_S}", "-m", "components.launch"],
        "numNodes": nodes,
        "numProcPerNode": processes,
        "env": [{"name": variable, "value": value} for variable, value in variables.items()],
    }
    if limits:
        trainer["resourcesPerNode"] = {"requests": limits, "limits": limits}
    spec: dict[str, Any] = {"runtimeRef": {"name": asked.runtime}, "trainer": trainer}
    if pod := _pod(asked):
        job_template = {"name": CONTAINER, "template": {"spec": {"template": {"spec": pod}}}}
        runtime = {"template": {"spec": {"replicatedJobs": [job_template]}}}
        spec["runtimePatches"] = [{"manager": "plumbline", "trainingRuntimeSpec": runtime}]
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": name,
            "namespace": asked.namespace or _own_namespace(),
            "labels": {"app.kubernetes.io/managed-by": "plumbline"},
        },
        "spec": spec,
    }


def _pod(asked: Nodes) -> dict[str, Any]:
    """What is changed of the runtime's pods."""
    pod: dict[str, Any] = {}
    if asked.node_selector:
        pod["nodeSelector"] = asked.node_selector
    if asked.tolerations:
        pod["tolerations"] = list(asked.tolerations)
    if asked.service_account:
        pod["serviceAccountName"] = asked.service_account
    if asked.shm:
        pod["volumes"] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": asked.shm}}]
        pod["containers"] = [{"name": CONTAINER, "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}]}]
    return pod


def _own_namespace() -> str:
    try:
        return OWN_NAMESPACE.read_text("utf-8").strip()
    except OSError:
        raise InputError(f"{NODES}.namespace is empty, and this process is in no pod. Name the namespace.") from None
