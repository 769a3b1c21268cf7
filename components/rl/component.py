"""Kubeflow's view of the rl step."""

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components.component import component


@component
def rl(
    settings: dict[str, object],
    data: Input[Dataset],
    policy: Input[Model],
    model: Output[Model],
    metrics: Output[Metrics],
    reward: Input[Model] | None = None,
    cost: Input[Model] | None = None,
    task: str = "rl",
    fingerprint: str = "",
) -> None:
    """Trains the policy against the reward and the cost model, as far as the algorithm needs them."""
    from components.launch import launch

    launch("rl", settings, metrics, task, fingerprint, data=data, policy=policy, reward=reward, cost=cost, model=model)
