"""Addresses as people write them: a local path, `~` included, or gs://bucket/name."""

from pathlib import Path

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


def refuse_remote(address: str, setting: str, reason: str) -> Path:
    """The local path at the address. Raises InputError naming the setting when it is on gs://, where it cannot be."""
    if is_remote(address):
        raise InputError(f"{setting} is {address!r}; accepted: a local folder, {reason}.")
    return local_path(address)


def bucket_and_name(address: str) -> tuple[str, str]:
    """The bucket and the object name of a gs:// address. Raises InputError where one of them is missing."""
    bucket, _, name = address.removeprefix(GS).partition("/")
    if not bucket or not name.strip("/"):
        raise InputError(f"{address!r} is not an object address; accepted: gs://bucket/name.")
    return bucket, name.rstrip("/")
