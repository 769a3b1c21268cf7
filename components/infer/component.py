"""Kubeflow's view of the infer step."""

from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components.component import component


@component
def infer(
    settings: dict[str, object],
    data: Input[Dataset],
    release: Input[Artifact],
    deployment: Input[Artifact],
    reward: Input[Model],
    responses: Output[Artifact],
    metrics: Output[Metrics],
    cost: Input[Model] | None = None,
    task: str = "infer",
    fingerprint: str = "",
) -> None:
    """Checks what is deployed and answers a file of prompts with it."""
    from components.launch import launch

    launch(
        "infer", settings, metrics, task, fingerprint,
        data=data, release=release, deployment=deployment, reward=reward, cost=cost, responses=responses,
    )
