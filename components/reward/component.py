"""Kubeflow's view of the reward step."""

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components.component import component


@component
def reward(
    settings: dict[str, object],
    data: Input[Dataset],
    sft: Input[Model],
    model: Output[Model],
    metrics: Output[Metrics],
    task: str = "reward",
    fingerprint: str = "",
) -> None:
    """Trains a scalar model on the preferences: a reward model, or a cost model."""
    from components.launch import launch

    launch("reward", settings, metrics, task, fingerprint, data=data, sft=sft, model=model)
