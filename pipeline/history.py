"""How a local run was, or is, as its folder tells."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.artifacts import read_json
from components.errors import InputError
from pipeline.documents import read_document
from pipeline.logs import HEADING
from pipeline.overrides import amend
from pipeline.runs import RunFolder, shown
from pipeline.screen import Screen
from pipeline.summary import Result, Status


def show(path: Path, screen: Screen) -> None:
    """Show the table of a local run: from its summary, or from what its steps have recorded so far.

    Raises InputError for a folder that is no run's.
    """
    folder = RunFolder(path.resolve())
    written = folder.path / "settings.yaml"
    if not written.is_file():
        raise InputError(f"{path}: no settings.yaml in this folder; name a run by its id, or latest.")
    if folder.summary.is_file():
        summary = read_json(folder.summary)
        screen.table(summary["status"], summary["seconds"], [_told(step) for step in summary["steps"]])
    else:
        tasks = list(_so_far(folder, amend(read_document(written), (), f"in {written}")[1].tasks()))
        screen.table("running", time.time() - written.stat().st_mtime, tasks)
        screen.line("  no summary yet: it is still running, or its process was killed")
    screen.paths({"run": folder.run_id, "log": shown(folder.log)})


def _told(step: dict[str, Any]) -> Result:
    """A step as the summary tells of it."""
    metrics = {name: math.nan if value is None else value for name, value in step["metrics"].items()}
    return Result(step["name"], step["status"], step["seconds"], metrics, alerts=step["alerts"])


def _so_far(folder: RunFolder, tasks: tuple[str, ...]) -> Iterator[Result]:
    """The tasks of a run that has not ended: recorded ones, the one that the log was last about, and the rest."""
    log = folder.log.read_text(encoding="utf-8") if folder.log.is_file() else ""
    started = [line.removeprefix(HEADING) for line in log.splitlines() if line.startswith(HEADING)]
    for task in tasks:
        record = folder.recorded(task)
        if record:
            how: Status = record["status"] if record["status"] in ("succeeded", "cached") else "failed"
            yield Result(task, how, record["seconds"], record.get("metrics", {}), error=record.get("error", ""))
        else:
            yield Result(task, "running" if started[-1:] == [task] else "waiting")
