"""Kubeflow's view of the demo step."""

from kfp.dsl import Dataset, Metrics, Output

from components.component import component


@component
def demo(
    settings: dict[str, object],
    raw: Output[Dataset],
    metrics: Output[Metrics],
    task: str = "demo",
    fingerprint: str = "",
) -> None:
    """Writes the demonstrations, preferences and prompts of the demo world."""
    from components.launch import launch

    launch("demo", settings, metrics, task, fingerprint, raw=raw)
