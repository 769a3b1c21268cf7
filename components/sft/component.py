"""Kubeflow's view of the sft step."""

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components.component import component


@component
def sft(
    settings: dict[str, object],
    data: Input[Dataset],
    base: Input[Model],
    model: Output[Model],
    metrics: Output[Metrics],
    task: str = "sft",
    fingerprint: str = "",
) -> None:
    """Trains the base model to imitate the demonstrations."""
    from components.launch import launch

    launch("sft", settings, metrics, task, fingerprint, data=data, base=base, model=model)
