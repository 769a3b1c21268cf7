"""Kubeflow's view of the evaluate step."""

from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components.component import component


@component
def evaluate(
    settings: dict[str, object],
    data: Input[Dataset],
    policy: Input[Model],
    baseline: Input[Model],
    reward: Input[Model],
    report: Output[Artifact],
    metrics: Output[Metrics],
    cost: Input[Model] | None = None,
    task: str = "evaluate",
    fingerprint: str = "",
) -> bool:
    """Compares the policy with its baseline on held-out prompts; gives back whether it passed."""
    from components.launch import launch

    values = launch(
        "evaluate",
        settings,
        metrics,
        task,
        fingerprint,
        data=data,
        policy=policy,
        baseline=baseline,
        reward=reward,
        cost=cost,
        report=report,
    )
    return values["gate/passed"] == 1.0
