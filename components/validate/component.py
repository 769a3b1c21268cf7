"""Kubeflow's view of the validate step."""

from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components.component import component


@component
def validate(
    settings: dict[str, object],
    data: Input[Dataset],
    base: Input[Model],
    report: Output[Artifact],
    metrics: Output[Metrics],
    task: str = "validate",
    fingerprint: str = "",
) -> None:
    """Checks every row and the base model before a GPU is asked for; fails on what is wrong."""
    from components.launch import launch

    launch("validate", settings, metrics, task, fingerprint, data=data, base=base, report=report)
