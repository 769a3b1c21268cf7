"""Kubeflow's view of the deploy step."""

from kfp.dsl import Artifact, Input, Metrics, Output

from components.component import component


@component
def deploy(
    settings: dict[str, object],
    release: Input[Artifact],
    deployment: Output[Artifact],
    metrics: Output[Metrics],
    task: str = "deploy",
    fingerprint: str = "",
) -> None:
    """Points the serving folder or the cluster at the release."""
    from components.launch import launch

    launch("deploy", settings, metrics, task, fingerprint, release=release, deployment=deployment)
