"""Files and folders, here and on gs://: fetched, put, listed, removed, told apart."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from components.artifacts import content_digest, file_sha256, json_digest
from components.errors import InputError
from components.storage.addresses import is_remote, local_path
from components.storage.bucket import Bucket, Stored, opened
from components.storage.download import download
from components.storage.locks import exclusive
from components.storage.staging import staging_folder
from components.storage.upload import same_content, upload


def fetch(address: str, into: Path | None = None, beside: Path | None = None) -> Path:
    """A local path with the file or folder at `address`: itself when local, a copy when gs://.

    A relative path is looked for in the folder `beside` first. A copy lies in `into`, else in the user's cache; one
    that was cut off goes on from there. Raises InputError when nothing is there, or when it changes meanwhile.
    """
    if beside is not None and not is_remote(address) and (beside / address).exists():
        return beside / address
    if not is_remote(address):
        path = local_path(address)
        if not path.exists():
            raise InputError(f"{address}: no such file or folder (looked in {Path.cwd()}).")
        return path
    with opened(address) as (bucket, prefix):
        found = _objects(bucket, prefix, address)
        place = into or staging_folder(address, {stored.name: stored.generation for stored in found})
        top = place / PurePosixPath(prefix).name
        targets = {_target(top, prefix, stored, address): stored for stored in found}
        place.mkdir(parents=True, exist_ok=True)
        with exclusive(place / f".{top.name}.lock"):
            download(bucket, targets, top.name)
    return top


def put_folder(folder: Path, address: str, last: str = "") -> None:
    """Make the folder at the address a copy of `folder`; a local one appears whole, by rename, and all may read it.

    On gs:// what is there with the same content stays, so an upload that was cut off goes on; the file named `last` is
    written after the others and removed before them: where it is, they are. Raises InputError when another process
    writes there.
    """
    if is_remote(address):
        with opened(address) as (bucket, prefix):
            _put(bucket, prefix, folder, last)
        return
    with new_folder(address) as made:
        shutil.copytree(folder, made, dirs_exist_ok=True)
        for path in [made, *made.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)  # the source may be private: a temporary folder is


@contextmanager
def new_folder(address: str, last: str = "") -> Iterator[Path]:
    """A local folder to fill; it appears at the address when the block ends and replaces what was there.

    A local one appears whole, by rename; on gs:// the file named `last` comes after the others. When the block
    raises, nothing appears.
    """
    if is_remote(address):
        with tempfile.TemporaryDirectory(prefix="plumbline-") as scratch:
            yield Path(scratch)
            put_folder(Path(scratch), address, last)
        return
    target = local_path(address)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        made = temporary / target.name
        made.mkdir()
        yield made
        for path in filter(Path.is_file, made.rglob("*")):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        remove(address)
        made.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove(address: str) -> None:
    """Remove the file or folder at the address, if there is one."""
    if is_remote(address):
        with opened(address) as (bucket, prefix):
            for stored in bucket.listed(prefix):
                bucket.delete(stored)
        return
    path = local_path(address)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_file(address: str) -> bool:
    """Whether there is a file, and no folder, at the address."""
    if is_remote(address):
        with opened(address) as (bucket, name):
            return bucket.find(name) is not None
    path = local_path(address)
    return path.exists() and not path.is_dir()


def list_folders(address: str) -> list[str]:
    """The names of the folders directly in the folder at the address, sorted; none when nothing is there."""
    if is_remote(address):
        return sorted({name.split("/")[0] for name in list_names(address) if "/" in name})
    path = local_path(address)
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []


def list_names(address: str) -> list[str]:
    """The files in the folder at the address and below it, relative to it, sorted; none when there is no folder."""
    if is_remote(address):
        with opened(address) as (bucket, prefix):
            names = [stored.name[len(prefix) + 1 :] for stored in bucket.listed(prefix)]
            return sorted(name for name in names if name)
    path = local_path(address)
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir())


def fingerprint(address: str) -> str:
    """A digest that changes when the content at `address` does: sha256 locally, names and generations on gs://.

    Raises InputError when nothing is there.
    """
    if not is_remote(address):
        path = fetch(address)
        return content_digest(path)[1] if path.is_dir() else file_sha256(path)
    with opened(address) as (bucket, prefix):
        return json_digest({stored.name: stored.generation for stored in _objects(bucket, prefix, address)})


def _put(bucket: Bucket, prefix: str, folder: Path, last: str) -> None:
    """Upload a folder, drop what is there besides, and write `last` when all else is as it should be."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {f"{prefix}/{path.relative_to(folder).as_posix()}": path for path in paths}
    there = {stored.name: stored for stored in bucket.listed(prefix)}
    end = f"{prefix}/{last}"
    closing = {name: files.pop(name) for name in [end] if last and name in files}
    if closing and end in there and not same_content(there[end], closing[end]):
        bucket.delete(there.pop(end))
    label = PurePosixPath(prefix).name
    upload(bucket, files, there, label)
    for name, stored in there.items():
        if name not in files and name not in closing:
            bucket.delete(stored)
    upload(bucket, closing, there, label)


def _objects(bucket: Bucket, prefix: str, address: str) -> Sequence[Stored]:
    """The object at the address, or those in the folder there.

    Raises InputError when there is none, and where an object has the name of a folder of others.
    """
    found = bucket.listed(prefix)
    if not found:
        raise InputError(f"{address}: no object there. Check the bucket, the name and the credentials.")
    folders = {str(folder) for stored in found for folder in PurePosixPath(stored.name).parents}
    if clash := next((stored.name for stored in found if stored.name in folders), None):
        raise InputError(
            f"{bucket.address(clash)} is an object and a folder of objects too; rename or remove one of them."
        )
    return found


def _target(top: Path, prefix: str, stored: Stored, address: str) -> Path:
    """Where an object goes below `top`. Raises InputError for a name that would lead out of it, or to no file."""
    parts = stored.name[len(prefix) :].removeprefix("/").split("/") if stored.name != prefix else []
    if any(part in ("", ".", "..") or "\\" in part for part in parts) or top.name in ("", ".", ".."):
        raise InputError(f"{address}: holds {stored.name!r}, which is no file's name here; rename or remove it.")
    return top.joinpath(*parts)
