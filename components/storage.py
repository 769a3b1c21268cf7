"""Local paths and gs:// addresses behind a few verbs, on google-cloud-storage."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from components.errors import InputError

GS = "gs://"


def is_remote(address: str) -> bool:
    """Whether the address is an object-store address rather than a local path."""
    return address.startswith(GS)


def fetch(address: str, into: Path | None = None, beside: Path | None = None) -> Path:
    """A local path with the file or folder at `address`: itself when local, a copy when gs://.

    A relative path is looked for in the folder `beside` first. Raises InputError when nothing is there.
    """
    if beside is not None and not is_remote(address) and (beside / address).exists():
        return beside / address
    if not is_remote(address):
        path = Path(address)
        if not path.exists():
            raise InputError(f"{address}: no such file or folder (looked in {Path.cwd()}).")
        return path
    into = into or Path(tempfile.mkdtemp(prefix="plumbline-"))
    bucket, prefix = _bucket(address)
    blobs = [blob for blob in bucket.list_blobs(prefix=prefix) if _belongs(blob.name, prefix)]
    if not blobs:
        raise InputError(f"{address}: no object there. Check the bucket, the name and the credentials.")
    for blob in blobs:
        target = into / Path(prefix).name / blob.name[len(prefix) :].lstrip("/")
        if blob.name == prefix:
            target = into / Path(prefix).name
        target.parent.mkdir(parents=True, exist_ok=True)
        blob.download_to_filename(str(target))
    return into / Path(prefix).name


def put_folder(folder: Path, address: str) -> None:
    """Copy every file of `folder` to the address; a local target appears whole, by rename."""
    if is_remote(address):
        bucket, prefix = _bucket(address)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                bucket.blob(f"{prefix}/{path.relative_to(folder).as_posix()}").upload_from_filename(str(path))
        return
    target = Path(address)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        shutil.copytree(folder, temporary / target.name)
        if target.exists():
            shutil.rmtree(target)
        (temporary / target.name).rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_text(text: str, address: str) -> None:
    """Write a small file whole: by rename locally, as one object on gs://."""
    if is_remote(address):
        bucket, name = _bucket(address)
        bucket.blob(name).upload_from_string(text, content_type="application/json")
        return
    path = Path(address)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def get_text(address: str) -> str | None:
    """The text at the address, or None when nothing is there."""
    if is_remote(address):
        bucket, name = _bucket(address)
        blob = bucket.get_blob(name)
        return None if blob is None else str(blob.download_as_text())
    path = Path(address)
    return path.read_text(encoding="utf-8") if path.exists() else None


def fingerprint(address: str) -> str:
    """A digest that changes when the content at `address` does: sha256 locally, names and generations on gs://.

    Raises InputError when nothing is there.
    """
    from components.artifacts import content_digest, file_sha256, json_digest

    if not is_remote(address):
        path = fetch(address)
        return content_digest(path)[1] if path.is_dir() else file_sha256(path)
    bucket, prefix = _bucket(address)
    found = {b.name: b.generation for b in bucket.list_blobs(prefix=prefix) if _belongs(b.name, prefix)}
    if not found:
        raise InputError(f"{address}: no object there. Check the bucket, the name and the credentials.")
    return json_digest(found)


def _bucket(address: str) -> tuple[Any, str]:
    """The bucket object and the object name of a gs:// address."""
    from google.cloud import storage

    bucket, _, name = address.removeprefix(GS).partition("/")
    if not bucket or not name:
        raise InputError(f"{address!r} is not an object address; accepted: gs://bucket/name.")
    return storage.Client().bucket(bucket), name.rstrip("/")


def _belongs(name: str, prefix: str) -> bool:
    """Whether an object is the one asked for or lies in the folder asked for.

    Neither a name-alike beside it, nor the empty object ending in a slash by which consoles mark a folder.
    """
    return name == prefix or (name.startswith(prefix + "/") and not name.endswith("/"))
