"""Kubeflow's view of the upload step."""

from kfp.dsl import Artifact, Input, Metrics, Model, Output

from components.component import component


@component
def upload(
    settings: dict[str, object],
    model: Input[Model],
    report: Input[Artifact],
    release: Output[Artifact],
    metrics: Output[Metrics],
    task: str = "upload",
    fingerprint: str = "",
) -> None:
    """Publishes the model under its digest and registers it as a candidate."""
    from components.launch import launch

    launch("upload", settings, metrics, task, fingerprint, model=model, report=report, release=release)
