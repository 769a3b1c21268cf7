"""Kubeflow's view of the preprocess step."""

from kfp.dsl import Dataset, Input, Metrics, Output

from components.component import component


@component
def preprocess(
    settings: dict[str, object],
    data: Output[Dataset],
    metrics: Output[Metrics],
    raw: Input[Dataset] | None = None,
    task: str = "preprocess",
    fingerprint: str = "",
) -> None:
    """Turns sources of any accepted format into one clean, split data folder."""
    from components.launch import launch

    launch("preprocess", settings, metrics, task, fingerprint, raw=raw, data=data)
