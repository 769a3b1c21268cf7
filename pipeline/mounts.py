"""What containers share with this machine: the folders a run writes and the files its settings name, at their paths."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from components.sources import outside
from components.storage import is_remote
from pipeline.settings import Settings

GOOGLE_KEY = "GOOGLE_APPLICATION_CREDENTIALS"
"""The variable that names the file with which Google's libraries sign in."""


@dataclass(frozen=True)
class Mount:
    """A file or folder of this machine that a container sees at the same absolute path."""

    path: Path
    writable: bool

    def volume(self) -> dict[str, str]:
        """It as Docker's interface has it."""
        return {"bind": str(self.path), "mode": "rw" if self.writable else "ro"}


def mounts(settings: Settings, runs_dir: Path) -> list[Mount]:
    """What the tasks of a run read and write outside their containers; the settings are anchored.

    Folders that are written to are made where they are not there.
    """
    written = [str(runs_dir.absolute()), settings.checkpoints, settings.upload.registry]
    if settings.deploy.target == "local":
        written.append(settings.deploy.serving_dir)
    demo = settings.demo is not None
    named = [address for task in settings.tasks() for _, _, address in outside(task, settings.step(task), demo)]
    read = [address for address in named if not is_remote(address) and Path(address).exists()]
    if key_file := os.environ.get(GOOGLE_KEY):
        read.append(str(Path(key_file).absolute()))
    found = [Mount(Path(address), writable=True) for address in written if address and not is_remote(address)]
    for mount in found:
        mount.path.mkdir(parents=True, exist_ok=True)
    return found + [Mount(Path(path), writable=False) for path in read if not _lies_in(Path(path), found)]


def _lies_in(path: Path, mounts: Iterable[Mount]) -> bool:
    """Whether a path is, or lies in, one that is shared already."""
    return any(path.is_relative_to(mount.path) for mount in mounts)


def hand_over(folder: Path, user: int) -> None:
    """Give the folder, and all in it that is not, to a user and a group of this number."""
    for path in (folder, *folder.rglob("*")):
        with suppress(FileNotFoundError):  # MLflow's database has files that come and go
            if path.lstat().st_uid != user:
                os.chown(path, user, user, follow_symlinks=False)
