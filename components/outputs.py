"""Where a step that a person starts by hand may write: never over files that are not plumbline's own."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from components.artifacts import MANIFEST, read_manifest
from components.errors import InputError
from components.storage import fetch, is_file, is_remote, list_names, local_path, put_folder

WITHOUT_MANIFEST = ("demo",)  # raw data comes as a person's own would: without a manifest
CHECKPOINTS = "PLUMBLINE_CHECKPOINTS"  # read by components.checkpoints, which loads torch


@contextmanager
def claimed(step: str, address: str | Path, option: str) -> Iterator[Path]:
    """The local folder in which the step writes what ends up at the address, a folder here or on gs://.

    Raises InputError naming `option` when that is a file or holds what is not to be written over: files that no
    manifest of plumbline's lists or, for a step without a manifest, any that the step would not write the same.
    """
    address = str(address)
    if is_file(address):
        raise InputError(f"{option} is {address}, which is a file; give a folder.")
    names, folder = list_names(address), local_path(address)
    if names and step not in WITHOUT_MANIFEST:
        _refuse(option, address, _unlisted(address, names))
    if is_remote(address):
        with tempfile.TemporaryDirectory(prefix="plumbline-") as scratch, _checkpoints_beside(address):
            made = Path(scratch) / folder.name
            yield made
            if names and step in WITHOUT_MANIFEST:
                _refuse(option, address, _different(fetch(address), made))
            put_folder(made, address, last=MANIFEST)
    elif not names or step not in WITHOUT_MANIFEST:
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="plumbline-") as scratch:
            yield Path(scratch)
            _refuse(option, address, _different(folder, Path(scratch)))
            shutil.copytree(scratch, folder, dirs_exist_ok=True)


@contextmanager
def _checkpoints_beside(address: str) -> Iterator[None]:
    """Inside, checkpoints lie beside the output on gs:// too, unless the environment says where."""
    if os.environ.get(CHECKPOINTS):
        yield
        return
    os.environ[CHECKPOINTS] = f"{address.rstrip('/').rpartition('/')[0]}/checkpoints"
    try:
        yield
    finally:
        del os.environ[CHECKPOINTS]


def _unlisted(address: str, names: Sequence[str]) -> list[str]:
    """The files that the folder's manifest does not list; all of them where there is no manifest of ours."""
    try:
        manifest = fetch(f"{address.rstrip('/')}/{MANIFEST}")
        listed = {MANIFEST, *read_manifest(manifest.parent)["files"]}
    except (InputError, AttributeError, KeyError, TypeError):  # none, or another program's
        listed = set()
    return [name for name in names if name not in listed]


def _different(folder: Path, made: Path) -> list[str]:
    """The files of the folder that are not in `made` with the same content."""
    return [
        name
        for name in list_names(str(folder))
        if not (made / name).is_file() or (made / name).read_bytes() != (folder / name).read_bytes()
    ]


def _refuse(option: str, address: str, foreign: Sequence[str]) -> None:
    """Raise InputError when there are such files."""
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise InputError(
            f"{option} is {address}, which holds files that would be lost ({foreign[0]}{more}). "
            "Give a new or empty folder, or remove this one first."
        )
