"""How a run on a cluster ended: one line in the log, the state of its MLflow run, a message to a webhook.

Whatever fails here is a warning: a run that did its work is no failure for want of a messenger.
"""

import logging
import os
import sys
from typing import Protocol

from components import webhook
from components.mlflow_run import MlflowRun
from components.mlflow_server import without_password
from components.pipeline_run import PIPELINE_RUN, failures, found

logger = logging.getLogger(__name__)

SUCCEEDED, FAILED, CANCELLED, UNKNOWN = "succeeded", "failed", "cancelled", "unknown"
STATUS = {
    "SUCCEEDED": SUCCEEDED, "COMPLETE": SUCCEEDED, "CACHED": SUCCEEDED, "FAILED": FAILED,
    "CANCELLED": CANCELLED, "CANCELED": CANCELLED,
}  # fmt: skip
"""Our word for the states of old and new versions of Kubeflow; old ones may say RUNNING of what has ended."""
MLFLOW_STATUS = {SUCCEEDED: "FINISHED", FAILED: "FAILED", CANCELLED: "KILLED", UNKNOWN: "KILLED"}


class FinalStatus(Protocol):
    """What Kubeflow says of the tasks together; its PipelineTaskFinalStatus."""

    state: str
    error_message: str | None


def report(pipeline: str, final: FinalStatus) -> None:
    """Say how the run of `pipeline` ended. A run that the gate rejected has succeeded."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    logging.getLogger("components").setLevel(logging.INFO)
    run_id = os.environ.get(PIPELINE_RUN, "")
    tracked, failed = _tracked(run_id)
    status = STATUS.get(final.state) or (FAILED if failed else UNKNOWN)
    error = "" if status == SUCCEEDED else _reason(final, failed)
    logger.info("run %s of %s %s%s", run_id or "without an id", pipeline, status, f": {error}" if error else "")
    for run in tracked:
        _close(run, status)
    if trouble := webhook.send({"run": run_id, "status": status, "error": error, "pipeline": pipeline}):
        logger.warning("%s", trouble)


def _tracked(run_id: str) -> tuple[list[MlflowRun], dict[str, str]]:
    """The MLflow runs of the pipeline's run, and what went wrong in which task.

    There are none without an address or an id, and none of ours where Kubeflow's plugin keeps them.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI") or not run_id or "MLFLOW_RUN_ID" in os.environ:
        return [], {}
    try:
        runs = found(os.environ.get("MLFLOW_EXPERIMENT_NAME", "plumbline"), run_id)
        return runs, {task: reason for run in runs for task, reason in failures(run).items()}
    except Exception as error:  # see above
        logger.warning("MLflow failed (%s); the state of the run is not written there", without_password(error))
        return [], {}


def _reason(final: FinalStatus, failed: dict[str, str]) -> str:
    """The tasks that failed, and why; Kubeflow's own words where nothing better is known."""
    told = "; ".join(f"{task}: {reason}" for task, reason in failed.items())
    return told or final.error_message or f"Kubeflow gives no reason for the state {final.state}"


def _close(run: MlflowRun, status: str) -> None:
    """End an MLflow run."""
    try:
        run.set_tag("plumbline.status", status)
        run.end(MLFLOW_STATUS[status])
    except Exception as error:  # see above
        logger.warning("MLflow failed (%s); run %s stays open there", without_password(error), run.run_id)
