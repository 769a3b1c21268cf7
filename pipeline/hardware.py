"""What the tasks ask of the cluster: hardware, image, attempts and time. A local run asks nothing."""

import math
import re
import warnings
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from components.settings import Group

# A step is called validate, and so is a method that pydantic no longer wants anybody to use.
warnings.filterwarnings("ignore", message='Field name "validate" in')

QUANTITY = r"^[0-9]+(\.[0-9]+)?(E|P|T|G|M|K|Ei|Pi|Ti|Gi|Mi|Ki)?$"
FACTOR = {"": 1.0} | {
    unit + binary: math.pow(base, power)
    for power, unit in enumerate("KMGTPE", start=1)
    for binary, base in (("", 1000), ("i", 1024))
}
"""The bytes that a unit stands for."""
IMAGE = r"^[^\s{}]+$"
Text = Annotated[str, Field(coerce_numbers_to_str=True)]
TRAINS = ("base", "sft", "reward", "cost", "rl")
RUNS_A_MODEL = (*TRAINS, "evaluate", "infer")
LABEL_NAME = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


def node_labels(labels: dict[str, str]) -> dict[str, str]:
    """The labels themselves. Raises ValueError for one that no node of a Kubernetes cluster can have."""
    for name, value in labels.items():
        if not LABEL_NAME.fullmatch(name) or not LABEL_VALUE.fullmatch(value):
            raise ValueError(
                f"has {name}: {value!r}, which no node can have as a label; accepted: {{label: value}} of a node, such "
                "as {cloud.google.com/gke-accelerator: nvidia-h100-80gb}; kubectl get nodes --show-labels lists them."
            )
    return labels


class Toleration(Group):
    """A taint that the task's pod accepts on its node."""

    key: str = ""
    """The taint's key; empty, with the operator Exists, stands for every taint."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """Equal compares the value; Exists accepts any."""
    value: str = ""
    """The taint's value, for Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """The taint's effect; absent stands for all of them."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.operator == "Exists" and self.value:
            raise ValueError(f"has the operator Exists and the value {self.value!r}; leave it out, or use Equal.")
        if self.operator == "Equal" and not self.key:
            raise ValueError("has no key; name the taint's key, or use the operator Exists for every taint.")
        return self

    def manifest(self) -> dict[str, str]:
        """The toleration as Kubernetes writes it, without what is empty."""
        return {name: value for name, value in self.model_dump().items() if value}


class TaskResources(Group):
    """What one task asks of the cluster."""

    gpus: int = Field(0, ge=0)
    """GPUs of the task, which runs a model; 0 lets it run on any node."""
    gpu_type: str = Field("nvidia.com/gpu", pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")
    """The resource name under which the cluster offers them."""
    cpu: str = Field("2", coerce_numbers_to_str=True, pattern=r"^[0-9]+(\.[0-9]+)?m?$")
    """CPU cores as Kubernetes writes them: 4, 0.5 or 500m."""
    memory: str = Field("8Gi", coerce_numbers_to_str=True, pattern=QUANTITY)
    """Memory as Kubernetes writes it: 64Gi."""
    shm: str = Field("", coerce_numbers_to_str=True, pattern=rf"^$|{QUANTITY}")
    """Size of /dev/shm, through which the processes of several GPUs and data loaders exchange tensors: 16Gi. It is a
    part of `memory`; empty leaves the 64 MiB that a container has. Fixed when the pipeline is compiled."""
    node_selector: Annotated[dict[str, Text], AfterValidator(node_labels)] = Field({})
    """Labels that a node must have to run the task: {cloud.google.com/gke-accelerator: nvidia-h100-80gb}."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints of nodes that the task accepts, such as those of nodes with GPUs."""
    image: str = Field("", pattern=rf"^$|{IMAGE}")
    """Container image of this task alone; empty takes images.train or images.pipeline."""
    retries: int = Field(2, ge=0, le=8)
    """Further attempts when the task fails, a minute apart at first and then twice as long each time: two hours before
    the eighth. Fixed when the pipeline is compiled."""
    timeout_s: int = Field(0, ge=0, lt=2**31)
    """Seconds after which an attempt is stopped and counts as failed; 0 lets it take as long as it takes. Fixed when
    the pipeline is compiled."""

    @model_validator(mode="after")
    def _shared_memory_fits(self) -> Self:
        if self.shm and amount(self.shm) > amount(self.memory):
            raise ValueError(
                f"has shm {self.shm}, above its memory {self.memory}, of which it is a part. Raise memory or lower shm."
            )
        return self

    def parameters(self, image: str) -> dict[str, Any]:
        """What a run can still change, as Kubeflow's parameters carry it; `image` is the one it runs in.

        Numbers are text, because Kubeflow's driver reads nothing else where it puts them on a pod.
        """
        return {
            "image": image,
            "cpu": self.cpu,
            "memory": self.memory,
            "gpus": str(self.gpus),
            "gpu_type": self.gpu_type,
            "node_selector": dict(self.node_selector),
            "tolerations": [toleration.manifest() for toleration in self.tolerations],
        }


def amount(quantity: str) -> float:
    """The bytes of a quantity as Kubernetes writes it: 2048.0 for 2Ki."""
    number = quantity.rstrip("EPTGMKi")
    return float(number) * FACTOR[quantity[len(number) :]]


LIGHT = TaskResources()
DATA = TaskResources(cpu="4", memory="32Gi")
MODEL = TaskResources(gpus=1, cpu="8", memory="64Gi", shm="16Gi")


class Resources(Group):
    """What each task asks of the cluster: a GPU where a model runs."""

    sources: TaskResources = LIGHT
    """Digests files of the data as they are when the run starts. A run cannot change it."""
    demo: TaskResources = LIGHT
    """Writes a few files."""
    preprocess: TaskResources = DATA
    """Holds the data in memory."""
    base: TaskResources = DATA
    """Fetches a model."""
    validate: TaskResources = LIGHT  # type: ignore[assignment]  # a step's name, not pydantic's method
    """Reads every row once."""
    sft: TaskResources = MODEL
    """Trains one model."""
    reward: TaskResources = MODEL
    """Trains one model."""
    cost: TaskResources = MODEL
    """Trains one model."""
    rl: TaskResources = TaskResources(gpus=1, cpu="16", memory="128Gi", shm="16Gi")
    """Holds the policy, its reference, the scorers and the critics."""
    evaluate: TaskResources = MODEL
    """Samples from two policies."""
    upload: TaskResources = LIGHT
    """Copies a folder."""
    deploy: TaskResources = LIGHT
    """Writes a pointer or a manifest."""
    infer: TaskResources = MODEL
    """Samples from the promoted policy."""
    notify: TaskResources = TaskResources(cpu="1", memory="2Gi", retries=0, timeout_s=900)
    """Says how the run ended. A run cannot change it."""

    @model_validator(mode="after")
    def _gpus_are_used(self) -> Self:
        for task in type(self).model_fields:
            if task not in RUNS_A_MODEL and (gpus := getattr(self, task).gpus):
                raise ValueError(
                    f"gives {task} gpus {gpus}, and {task} runs no model; accepted for {', '.join(RUNS_A_MODEL)}."
                )
        return self


class Images(Group):
    """The container images of the tasks; a local run uses none."""

    pipeline: str = Field("plumbline/pipeline:0.1.0", pattern=IMAGE)
    """For tasks that handle files: sources, demo, preprocess, validate, upload, deploy, notify."""
    train: str = Field("plumbline/train:0.1.0", pattern=IMAGE)
    """For tasks that run a model: base, sft, reward, cost, rl, evaluate, infer."""
