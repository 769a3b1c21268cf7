"""The MLflow run of a whole pipeline on a cluster, whose tasks know nothing of each other but Kubeflow's id of the run.

The first task that tracks something makes it, the others find it by its start, which is Kubeflow's id. Where Kubeflow's
own MLflow plugin is at work (MLFLOW_RUN_ID), it is not needed; a local run makes its own.
"""

from components.mlflow_run import PARENT_TAG, MlflowRun

PIPELINE_RUN = "PLUMBLINE_PIPELINE_RUN"
"""The variable with Kubeflow's id of the run."""
ERROR_TAG = "plumbline.error"
MAX_ERROR = 500  # characters that every MLflow store accepts as a tag


def found(experiment: str, pipeline_run: str) -> list[MlflowRun]:
    """The MLflow runs of a pipeline's run, the oldest first: one where a task tracked anything, else none."""
    return MlflowRun.of_start(experiment, pipeline_run)


def found_or_made(experiment: str, pipeline_run: str) -> MlflowRun:
    """The MLflow run of a pipeline's run. Tasks that make one at the same time all take the oldest."""
    for run in found(experiment, pipeline_run):
        return run
    made = MlflowRun.create(experiment, pipeline_run, pipeline_run)
    oldest = found(experiment, pipeline_run)[0]
    if oldest.run_id != made.run_id:
        made.client.delete_run(made.run_id)
    return oldest


def failures(run: MlflowRun) -> dict[str, str]:
    """What went wrong in the tasks below a run whose last attempt failed or never ended, by the task's name."""
    below = run.client.search_runs([run.experiment_id], f"tags.`{PARENT_TAG}` = '{run.run_id}'")
    last = {each.info.run_name: each for each in sorted(below, key=lambda each: each.info.start_time)}
    silent = {"FAILED": "failed", "RUNNING": "was stopped from outside, for want of memory or of time"}
    return {
        name: each.data.tags.get(ERROR_TAG, silent[each.info.status])
        for name, each in last.items()
        if each.info.status in silent
    }
