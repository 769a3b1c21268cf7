"""crc32c as Cloud Storage states it: the four bytes, big-endian, in base64."""

import base64
from pathlib import Path

BLOCK_BYTES = 1 << 20


def file_crc32c(path: Path) -> str:
    """The crc32c of a file, read in blocks."""
    import google_crc32c

    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            checksum.update(block)
    return _stated(checksum.digest())


def bytes_crc32c(content: bytes) -> str:
    """The crc32c of some bytes."""
    import google_crc32c

    return _stated(google_crc32c.Checksum(content).digest())


def _stated(digest: bytes) -> str:
    return base64.b64encode(digest).decode("ascii")
