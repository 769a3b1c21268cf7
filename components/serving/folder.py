"""The serving folder: `versions/<version>/` and `current.json`, which names the one that is served.

Deploy places versions and switches the pointer, `plumbline serve` watches it, infer checks what it points at.
The pointer is replaced whole, so whoever reads it sees the old one or the new one. Paths in it are relative:
the folder can be moved or mounted elsewhere.
"""

import logging
import shutil
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from components.artifacts import read_json, read_manifest, verify_manifest, write_json
from components.errors import InputError
from components.registry import promote
from components.release import version_of
from components.storage import put_folder, refuse_remote

logger = logging.getLogger(__name__)

POINTER = "current.json"
VERSIONS = "versions"
WATCHED = "which a server can watch"


@dataclass(frozen=True)
class Pointer:
    """Which version is served (current.json)."""

    name: str
    """The model's name towards clients."""
    version: str
    """The first digits of the digest."""
    digest: str
    """The digest of the version's files."""
    path: str
    """The version's folder, relative to the serving folder."""
    previous: str | None
    """The version served before, kept for a rollback."""
    deployed: str
    """When it was switched to: ISO 8601, UTC."""


def read_pointer(folder: Path) -> Pointer:
    """What the folder serves. Raises InputError when nothing is deployed there or the pointer is broken."""
    path = folder / POINTER
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Deploy a model first (`plumbline run`), or name another folder.")
    if not path.exists():
        raise InputError(f"{folder}: nothing is deployed there yet (no {POINTER}). Deploy a model first.")
    found = read_json(path)
    known = Pointer.__dataclass_fields__
    if not isinstance(found, dict) or found.keys() != known.keys():
        raise InputError(f"{path}: accepted: an object with {', '.join(known)}. Deploy again.")
    return Pointer(**found)


def publish(source: Path, name: str, folder: Path) -> Pointer:
    """Place the version in `source` under the serving folder and switch to it; the one before is kept.

    A version that is served already stays as it is. Raises InputError when the files in `source` are not
    those of its manifest; nothing is changed then.
    """
    digest = verify_manifest(source)
    place = folder / VERSIONS / version_of(digest)
    if not _is_whole(place, digest):
        put_folder(source, str(place))
    before = read_pointer(folder) if (folder / POINTER).exists() else None
    if before is not None and (before.name, before.digest) == (name, digest):
        return before
    previous = None if before is None else before.previous if before.digest == digest else before.version
    return _switch(folder, Pointer(name, version_of(digest), digest, "", previous, ""))


def rollback(folder: str | Path) -> Pointer:
    """Switch the serving folder back to the version served before; a second rollback switches forth again.

    Raises InputError when there is none, or when its files were altered.
    """
    folder = refuse_remote(str(folder), "--dir", WATCHED)
    current = read_pointer(folder)
    if current.previous is None:
        raise InputError(f"{folder}: {current.version} is the first version deployed there; nothing to go back to.")
    digest = verify_manifest(folder / VERSIONS / current.previous)
    return _switch(
        folder, replace(current, version=current.previous, digest=digest, previous=current.version)
    )


def name_champion(pointer: Pointer) -> str | None:
    """The MLflow registry's number for what is served, which is now the champion; None when it has no such version."""
    return promote(pointer.name, pointer.digest)


def _is_whole(place: Path, digest: str) -> bool:
    """Whether the version lies there with every file as it should be."""
    try:
        return place.is_dir() and read_manifest(place)["digest"] == digest == verify_manifest(place)
    except InputError:
        return False


def _switch(folder: Path, pointer: Pointer) -> Pointer:
    """Write the pointer, then remove the versions that neither it nor a rollback needs."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    pointer = replace(pointer, path=f"{VERSIONS}/{pointer.version}", deployed=now)
    write_json(folder / POINTER, asdict(pointer))
    for path in (folder / VERSIONS).iterdir():
        if path.name not in (pointer.version, pointer.previous) and not path.name.startswith("."):
            logger.info("%s: removing %s, which is neither served nor the one before", folder, path.name)
            shutil.rmtree(path)
    return pointer
