"""Kubeflow's view of the base step."""

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components.component import component


@component
def base(
    settings: dict[str, object],
    data: Input[Dataset],
    base: Output[Model],
    metrics: Output[Metrics],
    raw: Input[Dataset] | None = None,
    task: str = "base",
    fingerprint: str = "",
) -> None:
    """Fetches the base model, or trains a small one from the data's own text."""
    from components.launch import launch

    launch("base", settings, metrics, task, fingerprint, data=data, raw=raw, base=base)
