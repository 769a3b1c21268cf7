"""Kubeflow's view of the report on a run's end.

It is no step: it has no settings, artifacts or metrics, and its one input is what Kubeflow says of the others.
"""

from kfp.dsl import PipelineTaskFinalStatus

from components.component import component


@component
def notify(pipeline: str, status: PipelineTaskFinalStatus) -> None:
    """Says how the run ended: in the log, in MLflow and to a webhook."""
    from components.notify.ending import report

    report(pipeline, status)
