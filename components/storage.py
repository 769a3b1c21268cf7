"""Local paths and gs:// addresses behind a few verbs, on google-cloud-storage."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.errors import InputError

GS = "gs://"


def is_remote(address: str) -> bool:
    """Whether the address is an object-store address rather than a local path."""
    return address.startswith(GS)


def local_path(address: str) -> Path:
    """A local address as a path, `~` being the home directory. Raises InputError for a user there is not."""
    try:
        return Path(address).expanduser()
    except RuntimeError:
        raise InputError(f"{address}: no such user's home directory; write the path in full.") from None


def fetch(address: str, into: Path | None = None, beside: Path | None = None) -> Path:
    """A local path with the file or folder at `address`: itself when local, a copy when gs://.

    A relative path is looked for in the folder `beside` first. Raises InputError when nothing is there.
    """
    if beside is not None and not is_remote(address) and (beside / address).exists():
        return beside / address
    if not is_remote(address):
        path = local_path(address)
        if not path.exists():
            raise InputError(f"{address}: no such file or folder (looked in {Path.cwd()}).")
        return path
    into = into or Path(tempfile.mkdtemp(prefix="plumbline-"))
    with _bucket(address) as (bucket, prefix):
        for blob in _objects(bucket, prefix, address):
            target = into / Path(prefix).name / blob.name[len(prefix) :].lstrip("/")
            if blob.name == prefix:
                target = into / Path(prefix).name
            target.parent.mkdir(parents=True, exist_ok=True)
            blob.download_to_filename(str(target))
    return into / Path(prefix).name


def put_folder(folder: Path, address: str, last: str = "") -> None:
    """Copy every file of `folder` to the address; a local target appears whole, by rename, and all may read it.

    On gs:// the file named `last` is copied after the others: where it is, they are.
    """
    if is_remote(address):
        with _bucket(address) as (bucket, prefix):
            for path in sorted(folder.rglob("*"), key=lambda path: (path.name == last, path)):
                if path.is_file():
                    bucket.blob(f"{prefix}/{path.relative_to(folder).as_posix()}").upload_from_filename(str(path))
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
            remove(address)
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
        with _bucket(address) as (bucket, prefix):
            for blob in _listed(bucket, prefix):
                blob.delete()
        return
    path = local_path(address)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def list_folders(address: str) -> list[str]:
    """The names of the folders directly in the folder at the address, sorted; none when nothing is there."""
    if is_remote(address):
        with _bucket(address) as (bucket, prefix):
            below = [blob.name[len(prefix) + 1 :].split("/") for blob in _listed(bucket, prefix)]
            return sorted({parts[0] for parts in below if len(parts) > 1})
    path = local_path(address)
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []


def put_text(text: str, address: str) -> None:
    """Write a small file whole: by rename locally, as one object on gs://."""
    if is_remote(address):
        with _bucket(address) as (bucket, name):
            bucket.blob(name).upload_from_string(text, content_type="application/json")
        return
    path = local_path(address)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def get_text(address: str) -> str | None:
    """The text at the address, or None when nothing is there."""
    if is_remote(address):
        with _bucket(address) as (bucket, name):
            blob = bucket.get_blob(name)
            return None if blob is None else str(blob.download_as_text())
    path = local_path(address)
    return path.read_text(encoding="utf-8") if path.exists() else None


def fingerprint(address: str) -> str:
    """A digest that changes when the content at `address` does: sha256 locally, names and generations on gs://.

    Raises InputError when nothing is there.
    """
    from components.artifacts import content_digest, file_sha256, json_digest

    if not is_remote(address):
        path = fetch(address)
        return content_digest(path)[1] if path.is_dir() else file_sha256(path)
    with _bucket(address) as (bucket, prefix):
        return json_digest({blob.name: blob.generation for blob in _objects(bucket, prefix, address)})


@contextmanager
def _bucket(address: str) -> Iterator[tuple[Any, str]]:
    """The bucket object and the object name of a gs:// address; what Google refuses meanwhile is an InputError."""
    bucket, _, name = address.removeprefix(GS).partition("/")
    if not bucket or not name:
        raise InputError(f"{address!r} is not an object address; accepted: gs://bucket/name.")
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage
    from requests.exceptions import RequestException  # type: ignore[import-untyped]

    try:
        place = storage.Client().bucket(bucket)
    except (OSError, ValueError, GoogleAuthError) as error:  # OSError: no project; ValueError: no bucket's name
        raise _refusal(address, error) from None
    try:
        yield place, name.rstrip("/")
    except (GoogleAPIError, GoogleAuthError, RequestException) as error:
        raise _refusal(address, error) from None


def _refusal(address: str, error: Exception) -> InputError:
    """What Google says about the address, and what to do about it."""
    from google.api_core import exceptions
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, RefreshError, TransportError

    sign_in = "Sign in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS."
    moves: dict[type[Exception], str] = {
        DefaultCredentialsError: sign_in,
        RefreshError: sign_in,
        TransportError: "Check the network, then try again.",
        exceptions.Unauthorized: sign_in,
        exceptions.NotFound: "Create the bucket or correct the address.",
        exceptions.Forbidden: "Allow this account to read and write objects there, or sign in with another one.",
        exceptions.BadRequest: "Correct the address.",
        exceptions.GoogleAPIError: "Try again later.",
        GoogleAuthError: sign_in,
        ValueError: "Correct the address.",
        OSError: "Check the network and the setup of Google Cloud (GOOGLE_CLOUD_PROJECT), then try again.",
    }
    move = next((move for kind, move in moves.items() if isinstance(error, kind)), "")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return InputError(f"{address}: {reason}. {move}".rstrip())


def _objects(bucket: Any, prefix: str, address: str) -> list[Any]:
    """The object at the address, or those in the folder there. Raises InputError when there is none."""
    found = _listed(bucket, prefix)
    if not found:
        raise InputError(f"{address}: no object there. Check the bucket, the name and the credentials.")
    return found


def _listed(bucket: Any, prefix: str) -> list[Any]:
    return [blob for blob in bucket.list_blobs(prefix=prefix) if _belongs(blob.name, prefix)]


def _belongs(name: str, prefix: str) -> bool:
    """Whether an object is the one asked for or lies in the folder asked for.

    Neither a name-alike beside it, nor the empty object ending in a slash by which consoles mark a folder.
    """
    return name == prefix or (name.startswith(prefix + "/") and not name.endswith("/"))
