"""What the settings ask of the cluster, put on the tasks of a compiled pipeline.

Image, CPU, memory, GPUs, node selector and tolerations of a task are parameters of the run (`rl_gpus`), so that a
person who clones a run in Kubeflow's form can give a task other hardware without compiling anything. They are resolved
by Kubeflow's driver: container fields out of the task's inputs, which makes them a part of its cache key (a task with
another image, CPU, memory or number of GPUs runs again), node selector and tolerations out of the pipeline's own,
which does not. What Kubeflow resolves at compile time alone is fixed: /dev/shm, retries, time-outs, variables, names
of secrets, the user, and what `sources` and `notify` ask.

A task on several machines is watched from its own pod, which asks for little. What the pods of its TrainJob are is a
variable of that one, and so fixed too; how many they are is a setting of the step.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kfp import kubernetes
from kfp.dsl import PipelineTask
from kfp.dsl.pipeline_channel import PipelineChannel

from components.errors import InputError
from components.launch import compute_of
from components.pipeline_run import PIPELINE_RUN
from components.trainjob import ACCOUNT, CHECKPOINTS, NODES, USER, Nodes, PodSecret
from pipeline.hardware import RUNS_A_MODEL, TRAINS, TaskResources
from pipeline.secrets import Secret
from pipeline.settings import Settings

EXPERIMENT = "MLFLOW_EXPERIMENT_NAME"
RUN_LABEL = "metadata.labels['pipeline/runid']"
"""Where Kubeflow writes the run's id on every pod. Its placeholder would be a task's input, and no task with another
input is ever taken from the cache."""
ALL_ATTEMPTS = "2592000s"
"""What Kubeflow calls the longest back-off is to Argo the time from the first attempt's start to the last one's end: a
task that ran longer is not tried again, and one that is tried again is stopped then. So it is a month."""
WATCHER = TaskResources(cpu="1", memory="2Gi")
"""What the own pod of a task on several machines asks."""
Equip = Callable[[str, PipelineTask], None]
"""Puts on a task, by its name, what the place it runs at asks for."""


def image_of(settings: Settings, task: str) -> str:
    """The image that a task runs in, unless the run says otherwise."""
    of_its_kind = settings.images.train if task in RUNS_A_MODEL else settings.images.pipeline
    return asked_of(settings, task).image or of_its_kind


def asked_of(settings: Settings, task: str) -> TaskResources:
    """What the settings ask for a task."""
    asked = getattr(settings.resources, task)
    assert isinstance(asked, TaskResources)
    return asked


class NodesOfTask(NamedTuple):
    """On how many machines a task runs, and the setting that says so."""

    number: int
    key: str


def nodes_of(settings: Settings, task: str) -> NodesOfTask:
    """On how many machines a task runs."""
    step = settings.step(task) if task in settings.tasks() else None
    compute = compute_of(step) if step else None
    key = f"{task}.training.compute.nodes" if hasattr(step, "training") else f"{task}.compute.nodes"
    return NodesOfTask(compute.nodes if compute else 1, key)


def train_job_of(settings: Settings, task: str) -> Nodes:
    """What the pods of a task on several machines are. Raises InputError where they could not pass anything on."""
    nodes, asked = nodes_of(settings, task), asked_of(settings, task)
    if settings.exchange is None:
        raise InputError(
            f"{nodes.key} is {nodes.number} and exchange is not set: inputs and results pass between machines there. "
            "Set exchange to a folder on gs://, or the key to 1."
        )
    hardware = asked.parameters(image_of(settings, task)) | {"gpus": asked.gpus}
    secrets = [
        PodSecret(name=secret.name, env=secret.env, mount=secret.mount)
        for secret in settings.secrets
        if secret.reaches(task)
    ]
    return Nodes(
        **hardware,
        shm=asked.shm,
        exchange=settings.exchange,
        variables=tuple(settings.environment),
        secrets=tuple(secrets),
        image_pull_secrets=settings.image_pull_secrets,
    )


def equip(settings: Settings) -> "Equipment":
    """What puts images, hardware, variables and secrets on the tasks of a pipeline that a cluster runs."""
    return Equipment(settings, {})


class Equipment:
    """Equips the tasks of a pipeline that a cluster runs; a local run asks nothing of this."""

    def __init__(self, settings: Settings, chosen: Mapping[str, Any]) -> None:
        """`chosen` holds parameters of the run by name; of what is not among them, the settings' values are fixed."""
        self.settings, self.chosen = settings, chosen

    def parameters(self) -> dict[str, Any]:
        """The run parameters beside the steps' settings, by name: text, a mapping or a list, as the settings say."""
        return {
            f"{task}_{name}": value
            for task in self.settings.tasks()
            if nodes_of(self.settings, task).number == 1
            for name, value in self._hardware(task).items()
        }

    def given(self, chosen: Mapping[str, Any]) -> "Equipment":
        """The same with the parameters of a run."""
        return Equipment(self.settings, chosen)

    def __call__(self, task: str, node: PipelineTask) -> None:
        """Equip a task. Raises InputError as `train_job_of` does."""
        settings, asked = self.settings, asked_of(self.settings, task)
        _place(node, {name: self.chosen.get(f"{task}_{name}", value) for name, value in self._hardware(task).items()})
        _bound(node, asked)
        if nodes_of(settings, task).number > 1:
            node.set_env_variable(NODES, train_job_of(settings, task).model_dump_json(exclude_defaults=True))
            kubernetes.use_field_path_as_env(node, ACCOUNT, "spec.serviceAccountName")
        elif asked.shm:
            kubernetes.empty_dir_mount(node, "plumbline-shm", "/dev/shm", medium="Memory", size_limit=asked.shm)
        variables = {EXPERIMENT: settings.name, **settings.environment}
        if settings.checkpoints and task in TRAINS:
            variables[CHECKPOINTS] = settings.checkpoints
        for name, value in variables.items():
            node.set_env_variable(name, value)
        kubernetes.use_field_path_as_env(node, PIPELINE_RUN, RUN_LABEL)
        for secret in settings.secrets:
            if secret.reaches(task):
                _hand_over(node, secret)
        if settings.image_pull_secrets:
            kubernetes.set_image_pull_secrets(node, list(settings.image_pull_secrets))
        kubernetes.set_security_context(node, run_as_user=USER, run_as_non_root=True)

    def _hardware(self, task: str) -> dict[str, Any]:
        """Image and hardware of a task's own pod."""
        alone = nodes_of(self.settings, task).number == 1
        asked = asked_of(self.settings, task) if alone else WATCHER
        hardware = asked.parameters(image_of(self.settings, task))
        with_gpus = alone and task in RUNS_A_MODEL
        return hardware if with_gpus else {k: v for k, v in hardware.items() if not k.startswith("gpu")}


def _place(node: PipelineTask, hardware: Mapping[str, Any]) -> None:
    """Put image and hardware on a task, as constants or as parameters of the run."""
    node.set_container_image(hardware["image"])
    node.set_cpu_limit(hardware["cpu"]).set_memory_limit(hardware["memory"])
    if "gpus" in hardware:
        node.set_accelerator_type(hardware["gpu_type"]).set_accelerator_limit(hardware["gpus"])
    if hardware["node_selector"]:  # a parameter, or labels
        kubernetes.add_node_selector_json(node, hardware["node_selector"])
    kubernetes.add_toleration_json(node, hardware["tolerations"])
    # kfp passes a parameter into a group for a task's image, and forgets it for CPU, memory and GPUs
    node.register_pipeline_channels([value for value in hardware.values() if isinstance(value, PipelineChannel)])


def _bound(node: PipelineTask, asked: TaskResources) -> None:
    """Set how often and how long a task is tried."""
    if asked.retries:
        node.set_retry(asked.retries, backoff_duration="60s", backoff_factor=2.0, backoff_max_duration=ALL_ATTEMPTS)
    if asked.timeout_s:
        kubernetes.set_timeout(node, asked.timeout_s)


def _hand_over(node: PipelineTask, secret: Secret) -> None:
    """Name a secret to a task: as variables, or as a folder of files."""
    if secret.env:
        kubernetes.use_secret_as_env(node, secret.name, dict(secret.env))
    else:
        kubernetes.use_secret_as_volume(node, secret.name, secret.mount)
