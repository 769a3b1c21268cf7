"""From this machine to a bucket: many files at once, each stated with its crc32c, so that no other content is taken."""

import mimetypes
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.errors import InputError
from components.storage.bucket import Bucket, Overtaken, Stored
from components.storage.checksum import file_crc32c
from components.storage.parallel import Meter, in_parallel
from components.storage.session import PIECE_BYTES, SessionLost, begin_session

ATTEMPTS = 3


def upload(bucket: Bucket, files: Mapping[str, Path], there: Mapping[str, Stored], label: str) -> None:
    """Make every file the object of that name; `there` holds the objects that were listed before.

    An object with the same size and crc32c stays as it is. Raises Overtaken for one that another process wrote since it
    was listed, and InputError for a file that cannot be brought over undamaged.
    """
    stop = threading.Event()
    meter = Meter(label, sum(path.stat().st_size for path in files.values()))
    in_parallel([_Upload(bucket, path, name, there.get(name), meter, stop) for name, path in files.items()], stop)


def same_content(found: Stored | None, path: Path) -> bool:
    """Whether the object holds what the file does."""
    return found is not None and found.size == path.stat().st_size and found.crc32c == file_crc32c(path)


class _Upload:
    """One file on its way."""

    def __init__(
        self, bucket: Bucket, path: Path, name: str, found: Stored | None, meter: Meter, stop: threading.Event
    ) -> None:
        self.bucket, self.path, self.name, self.found, self.meter, self.stop = bucket, path, name, found, meter, stop
        self.address = bucket.address(name)

    def __call__(self) -> None:
        """Upload the file, unless the object is the same already."""
        if same_content(self.found, self.path):
            self.meter.add(self.path.stat().st_size)
            return
        crc32c = file_crc32c(self.path)
        generation, refused = self.found.generation if self.found else 0, ""
        for _ in range(ATTEMPTS):
            written, refused = self._attempt(crc32c, generation)
            if written is not None and written.crc32c == crc32c:
                return
            if written is not None:  # a store that does not compare what it is told took something else
                self.bucket.delete(written)
                generation, refused = 0, f"it became {written.crc32c} there and was removed again"
            if file_crc32c(self.path) != crc32c:
                raise InputError(f"{self.path}: changed while it was uploaded to {self.address}. Upload it again.")
        raise InputError(
            f"{self.address}: the content of {self.path} (crc32c {crc32c}) does not arrive undamaged, {ATTEMPTS} "
            f"times in a row: {refused}. Check the network and any proxy between, then try again."
        )

    def _attempt(self, crc32c: str, generation: int) -> tuple[Stored | None, str]:
        """The object as it was written, or None and why the content was refused.

        Raises Overtaken when the object is neither of that generation any more nor holds what the file does.
        """
        from google.api_core.exceptions import BadRequest, PreconditionFailed

        try:
            return self._written(crc32c, generation), ""
        except BadRequest as error:
            if "crc32c" not in str(error).lower():
                raise
            return None, str(error)
        except (PreconditionFailed, SessionLost) as error:
            # Our own write may have succeeded and the answer been lost; or somebody else wrote the same.
            found = self.bucket.find(self.name)
            if found is not None and same_content(found, self.path):
                return found, ""
            if isinstance(error, PreconditionFailed):
                raise Overtaken(self.address) from None
            return None, "the store forgot the upload"

    def _written(self, crc32c: str, generation: int) -> Stored:
        blob = self.bucket.place.blob(self.name)
        blob.crc32c = crc32c  # the store refuses other content itself, before the object appears
        content_type = mimetypes.guess_type(self.name)[0] or "application/octet-stream"
        if self.path.stat().st_size > PIECE_BYTES:
            return self._in_pieces(blob, content_type, generation)
        self._at_once(blob, content_type, generation)
        return Stored.of(blob)

    def _at_once(self, blob: Any, content_type: str, generation: int) -> None:
        content = self.path.read_bytes()
        write_object(self.bucket, blob, content, content_type, generation, self.stop)
        self.meter.add(len(content))

    def _in_pieces(self, blob: Any, content_type: str, generation: int) -> Stored:
        session = begin_session(self.bucket, blob, self.path, content_type, generation)
        try:
            while session.done is None:
                before = session.at
                self.bucket.patience.insist(session.advance, self.address, self.stop)
                self.meter.add(max(0, session.at - before))
        finally:
            session.close()
        done = session.done
        return Stored(self.name, int(done["generation"]), int(done["size"]), done.get("crc32c", ""), zipped=False)


def write_object(
    bucket: Bucket, blob: Any, content: bytes, content_type: str, generation: int | None, stop: threading.Event | None
) -> None:
    """Write a small object in one request, in place of the one of that generation; None: of whichever is there.

    The blob states the crc32c that the content must have.
    """

    def attempt() -> None:
        blob.upload_from_string(
            content, content_type, checksum=None, if_generation_match=generation, retry=None,
            timeout=bucket.patience.timeout,
        )  # fmt: skip

    bucket.patience.insist(attempt, bucket.address(blob.name), stop)
