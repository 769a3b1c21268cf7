"""Images, GPUs, CPU, memory, retries and the place of checkpoints on the tasks of a compiled pipeline."""

from collections.abc import Callable

from kfp.dsl import PipelineTask

from pipeline.settings import Settings

TRAINS = {"base", "sft", "reward", "cost", "rl"}
RUNS_A_MODEL = TRAINS | {"evaluate", "infer"}
CHECKPOINTS = "PLUMBLINE_CHECKPOINTS"
"""The variable that tells a step where its checkpoints are."""
Equip = Callable[[str, PipelineTask], None]


def image_of(settings: Settings, task: str) -> str:
    """The image that a task runs in."""
    return settings.images.train if task in RUNS_A_MODEL else settings.images.pipeline


def equip(settings: Settings) -> Equip:
    """The function that puts a task's image and resources on it; for the cluster, a local run has neither."""

    def on(task: str, node: PipelineTask) -> None:
        wanted = getattr(settings.resources, task)
        node.set_container_image(image_of(settings, task))
        node.set_cpu_limit(wanted.cpu).set_memory_limit(wanted.memory)
        if wanted.gpus:
            node.set_accelerator_type(wanted.gpu_type).set_accelerator_limit(wanted.gpus)
        if wanted.retries:
            node.set_retry(wanted.retries, backoff_duration="60s", backoff_factor=2.0, backoff_max_duration="1800s")

        if settings.checkpoints and task in TRAINS:
            node.set_env_variable(CHECKPOINTS, settings.checkpoints)

    return on
