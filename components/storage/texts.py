"""Small texts that say what is current: written whole, and by compare-and-swap where several may write."""

import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from uuid import uuid4

from components.storage.addresses import is_remote, local_path
from components.storage.bucket import MARK, Bucket, Overtaken, opened
from components.storage.checksum import bytes_crc32c
from components.storage.locks import exclusive
from components.storage.upload import write_object

ABSENT = "0"
RACES = 20  # nobody loses as many in a row by accident


@dataclass(frozen=True)
class Text:
    """What was read at an address."""

    content: str | None
    """None when nothing is there."""
    generation: str
    """Another one whenever the text was written; only worth comparing."""


def get_text(address: str) -> Text:
    """The text at the address, and which one it is."""
    if is_remote(address):
        with opened(address) as (bucket, name):
            return _remote_text(bucket, name)
    try:
        with local_path(address).open("rb") as file:
            return Text(file.read().decode("utf-8"), _local_generation(file.fileno()))
    except FileNotFoundError:
        return Text(None, ABSENT)


def put_text(text: str, address: str, generation: str | None = None) -> None:
    """Write a small file whole: by rename locally, as one object on gs://.

    With a `generation` only in place of that one. Raises Overtaken when another is there by now.
    """
    if is_remote(address):
        _put_remote(text, address, generation)
        return
    path = local_path(address)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    with nullcontext() if generation is None else exclusive(path.with_name(f".{path.name}.lock")):
        if generation is not None and get_text(address).generation != generation:
            raise Overtaken(address)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def update_text(address: str, change: Callable[[str | None], str | None]) -> None:
    """Put what `change` makes of the text at the address in its place; None leaves it as it is.

    When another process wrote meanwhile, what it wrote is read and changed. Raises Overtaken when that does not end.
    """
    for _ in range(RACES):
        read = get_text(address)
        text = change(read.content)
        if text is None:
            return
        try:
            put_text(text, address, read.generation)
        except Overtaken:
            continue
        return
    raise Overtaken(address)


def _remote_text(bucket: Bucket, name: str) -> Text:
    """Text and generation of one object, though it may be replaced between the two requests this takes."""
    from google.api_core.exceptions import NotFound

    for _ in range(RACES):
        found = bucket.find(name)
        if found is None:
            return Text(None, ABSENT)
        with suppress(NotFound):  # it was replaced or removed since: look again
            return Text(bucket.read(found).decode("utf-8"), str(found.generation))
    raise Overtaken(bucket.address(name))


def _put_remote(text: str, address: str, generation: str | None) -> None:
    from google.api_core.exceptions import PreconditionFailed

    with opened(address) as (bucket, name):
        blob, match = bucket.place.blob(name), None if generation is None else int(generation)
        blob.metadata, blob.crc32c = {MARK: uuid4().hex}, bytes_crc32c(text.encode())
        content_type = "application/json" if name.endswith(".json") else "text/plain; charset=utf-8"
        try:
            write_object(bucket, blob, text.encode(), content_type, match, None)
        except PreconditionFailed:
            # A write whose answer was lost is tried again and meets itself. The same text is no sign of that: another
            # process may have made the same of what both read.
            found = bucket.find(name)
            if found is None or found.mark != blob.metadata[MARK]:
                raise Overtaken(address) from None


def _local_generation(descriptor: int) -> str:
    """Another one for each file that was renamed to a name."""
    status = os.fstat(descriptor)
    return f"{status.st_mtime_ns}-{status.st_ino}"
