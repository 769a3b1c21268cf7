"""What a run leaves behind to read: a result per task and `summary.json`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from components.artifacts import Metrics, read_json
from components.errors import InputError
from components.tracking import ALERTS_FILE
from pipeline.promotion import DEPLOYMENT, RELEASE

Status = Literal["succeeded", "cached", "skipped", "failed", "running", "waiting"]
GATE = "gate/passed"


@dataclass(frozen=True)
class Result:
    """How one task ended, or how it is while its run goes on."""

    task: str
    status: Status
    seconds: float = 0.0
    metrics: Metrics = field(default_factory=dict)
    folder: Path | None = None
    error: str = ""
    fixable: bool = False
    """Whether the error is a person's to fix (InputError in the step)."""
    alerts: Sequence[Mapping[str, Any]] = ()
    """What went wrong while it trained: name, update and message of each alert."""


def read_metrics(folder: Path) -> Metrics:
    """The metrics a task left in its folder; none when it left none."""
    path = folder / "metrics"
    return dict(read_json(path)) if path.exists() else {}


def read_alerts(folder: Path | None) -> list[dict[str, Any]]:
    """The alerts a task left in its folder, in order; a line that its process did not finish is left out."""
    path = None if folder is None else folder / ALERTS_FILE
    if path is None or not path.exists():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole]


def status_of(results: Mapping[str, Result], failed: bool) -> str:
    """succeeded, failed, or rejected when the gate let nothing pass."""
    if failed or any(result.status == "failed" for result in results.values()):
        return "failed"
    gates = [result.metrics[GATE] for result in results.values() if GATE in result.metrics]
    return "rejected" if 0.0 in gates else "succeeded"


def summarize(
    run_id: str, status: str, seconds: float, tasks: Sequence[str], results: Mapping[str, Result]
) -> dict[str, Any]:
    """The content of summary.json. Tasks that never started are skipped."""
    ordered = [results.get(task, Result(task, "skipped")) for task in tasks]
    release = _document(results, "upload", RELEASE)
    deployment = _document(results, "deploy", DEPLOYMENT)
    gold = _document(results, "evaluate", "report/report.json").get("gold")
    summary = {
        "run_id": run_id,
        "status": status,
        "seconds": round(seconds, 3),
        "steps": [
            {
                "name": result.task,
                "status": result.status,
                "seconds": round(result.seconds, 3),
                "metrics": {key: value if math.isfinite(value) else None for key, value in result.metrics.items()},
                "alerts": list(result.alerts),
            }
            for result in ordered
        ],
        "promoted": bool(release) and deployment.get("applied", False),
        "model_dir": release.get("uri"),
        "model_digest": release.get("digest"),
        "served_digest": deployment.get("digest") if deployment.get("applied") else None,
    }
    if gold:
        summary["gold"] = gold
    return summary


def _document(results: Mapping[str, Result], task: str, name: str) -> dict[str, Any]:
    """A JSON file among a task's outputs; empty when the task did not get to write it."""
    result = results.get(task)
    if result is None or result.folder is None or result.status == "failed":
        return {}
    try:
        return dict(read_json(result.folder / name))
    except InputError:
        return {}
