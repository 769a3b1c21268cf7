"""Where a step that a person starts by hand may write: never over files that are not plumbline's own."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.artifacts import MANIFEST, read_manifest
from components.errors import InputError

WITHOUT_MANIFEST = ("demo",)  # raw data comes as a person's own would: without a manifest


@contextmanager
def claimed(step: str, folder: Path, option: str) -> Iterator[Path]:
    """The folder in which the step writes what ends up in `folder`.

    Raises InputError naming `option` when `folder` is a file or holds what is not to be written over: files that
    no manifest of plumbline's lists or, for a step without a manifest, any that the step would not write the same.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{option} is {folder}, which is a file; give a folder.")
    if not folder.exists() or not any(folder.iterdir()):
        yield folder
    elif step not in WITHOUT_MANIFEST:
        _refuse(option, folder, _unlisted(folder))
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="plumbline-") as scratch:
            yield Path(scratch)
            _refuse(option, folder, _different(folder, Path(scratch)))
            shutil.copytree(scratch, folder, dirs_exist_ok=True)


def _unlisted(folder: Path) -> list[str]:
    """The files that the folder's manifest does not list; all of them where there is no manifest of ours."""
    try:
        listed = {MANIFEST, *read_manifest(folder)["files"]}
    except (InputError, AttributeError, KeyError, TypeError):  # none, or another program's
        listed = set()
    return [name for name in _names(folder) if name not in listed]


def _different(folder: Path, made: Path) -> list[str]:
    """The files of the folder that are not in `made` with the same content."""
    return [
        name
        for name in _names(folder)
        if not (made / name).is_file() or (made / name).read_bytes() != (folder / name).read_bytes()
    ]


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _refuse(option: str, folder: Path, foreign: list[str]) -> None:
    """Raise InputError when there are such files."""
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise InputError(
            f"{option} is {folder}, which holds files that would be lost ({foreign[0]}{more}). "
            "Give a new or empty folder, or remove this one first."
        )
