"""The folder of one run, and where it lies among the others."""

import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.artifacts import read_json, write_json


@dataclass(frozen=True)
class RunFolder:
    """`<runs>/<run_id>/`: summary.json, settings.yaml, log.txt, steps/<task>.json and a link per task."""

    path: Path

    @classmethod
    def create(cls, runs_dir: Path) -> "RunFolder":
        """A new folder, named by the time and a few random digits; `<runs>/latest` points at it."""
        while True:
            path = runs_dir / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
            try:
                (path / "steps").mkdir(parents=True)
                break
            except FileExistsError:
                continue
        link = runs_dir / f".latest-{path.name}"
        link.symlink_to(path.name)
        link.replace(runs_dir / "latest")
        return cls(path)

    @property
    def run_id(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def log(self) -> Path:
        """Everything the steps printed."""
        return self.path / "log.txt"

    @property
    def summary(self) -> Path:
        """How the run ended."""
        return self.path / "summary.json"

    def record(self, task: str, **fields: Any) -> None:
        """Write a task's record, where its own process did not."""
        write_json(self._record(task), fields)

    def recorded(self, task: str) -> dict[str, Any]:
        """What a task's process recorded; empty when it did not get to it."""
        path = self._record(task)
        return dict(read_json(path)) if path.exists() else {}

    def link(self, task: str, folder: Path) -> None:
        """Make a task's outputs reachable from the run."""
        if folder.is_dir():
            (self.path / task).symlink_to(os.path.relpath(folder, self.path))

    def output(self, task: str, name: str) -> str | None:
        """A task's output as a path to show; None when it is not there."""
        path = self.path / task / name
        return shown(path) if path.exists() else None

    def tail(self, count: int) -> str:
        """The last lines of the log that say something."""
        lines = self.log.read_text(encoding="utf-8").splitlines()
        return "\n".join([line for line in lines if line.strip()][-count:])

    def _record(self, task: str) -> Path:
        return self.path / "steps" / f"{task}.json"


def shown(path: Path) -> str:
    """A path as people like it: relative when it is below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
