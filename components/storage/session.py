"""One object's resumable upload: a session that takes a file in pieces and, after a failure, says how far it got."""

import re
from pathlib import Path
from typing import Any

from components.errors import InputError
from components.storage.bucket import Bucket
from components.storage.patience import Patience

BLOCK_BYTES = 256 << 10  # what a session keeps is whole blocks of this size, until the last piece
PIECE_BYTES = 32 * BLOCK_BYTES  # 8 MiB, up to which the library sends an object in one request
GONE = (404, 410)
KEPT = re.compile(r"bytes=0-(\d+)")


class SessionLost(Exception):
    """The store does not know the session any more: it expired, or its object is complete and the answer was lost."""


class Session:
    """Sends a file piece by piece; each piece is asked for again only as far as it did not arrive."""

    def __init__(self, address: str, path: Path, size: int, patience: Patience) -> None:
        """`address` is what the store gave for the session; whoever has it may upload, without signing in."""
        import requests  # type: ignore[import-untyped]

        self._address, self._path, self._size, self._patience = address, path, size, patience
        self._http = requests.Session()
        self.at = 0
        """How many bytes the store has."""
        self.done: dict[str, Any] | None = None
        """The object, once it is complete."""
        self._doubtful = False

    def advance(self) -> None:
        """Send the next piece. Raises what is_transient knows, SessionLost, or what the store refuses."""
        if self._doubtful:  # of the piece that failed any part may have arrived, and so may the whole object
            self._heed(self._put(b"", f"bytes */{self._size}"))
            self._doubtful = False
            if self.done is not None:
                return
        with self._path.open("rb") as file:
            file.seek(self.at)
            piece = file.read(PIECE_BYTES)
        if not piece:
            raise InputError(f"{self._path}: became shorter while it was uploaded. Upload it again.")
        self._doubtful, before = True, self.at
        self._heed(self._put(piece, f"bytes {before}-{before + len(piece) - 1}/{self._size}"))
        if self.at == before:
            raise ConnectionError("the store kept nothing of what it was sent")
        self._doubtful = False

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def _put(self, piece: bytes, content_range: str) -> Any:
        headers = {"Content-Range": content_range}
        timeout = self._patience.timeout
        return self._http.put(self._address, data=piece, headers=headers, timeout=timeout, allow_redirects=False)

    def _heed(self, answer: Any) -> None:
        """Take note of what the store has now."""
        from google.api_core.exceptions import from_http_response

        if answer.status_code in (200, 201):
            self.done, self.at = answer.json(), self._size
        elif answer.status_code == 308:  # what is not a whole number of blocks is no count to rely on
            kept = KEPT.fullmatch(answer.headers.get("Range", ""))
            self.at = (int(kept[1]) + 1) // BLOCK_BYTES * BLOCK_BYTES if kept else 0
        elif answer.status_code in GONE:
            raise SessionLost
        else:
            raise from_http_response(answer)


def begin_session(bucket: Bucket, blob: Any, path: Path, content_type: str, generation: int) -> Session:
    """A session for the file, which replaces the object of that generation and no other."""
    size, patience = path.stat().st_size, bucket.patience
    address = patience.insist(
        lambda: blob.create_resumable_upload_session(
            content_type, size, checksum=None, if_generation_match=generation, retry=None, timeout=patience.timeout
        ),
        bucket.address(blob.name),
    )
    return Session(address, path, size, patience)
