"""crc32c as Cloud Storage states it: the four bytes, big-endian, in base64."""

import base64
from pathlib import Path

BLOCK_BYTES = 1 << 20


def file_crc32c(path: Path) -> str:
    """The crc32c of a file, read in blocks."""
    import google_crc32c

    checksum = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            checksum = google_crc32c.extend(checksum, block)
    return _stated(checksum)


def bytes_crc32c(content: bytes) -> str:
    """The crc32c of some bytes."""
    import google_crc32c

    return _stated(google_crc32c.value(content))


def _stated(checksum: int) -> str:
    return base64.b64encode(checksum.to_bytes(4, "big")).decode("ascii")
