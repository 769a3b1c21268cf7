"""From a bucket to this machine: ranges of many objects at once, each object renamed into place when it is whole.

An object grows in `.<name>.part` beside its target; `.<name>.part.jsonl` names its generation and, a line each, the
ranges that are complete. Whoever downloads the same generation to the same place again goes on from there.
"""

import gzip
import json
import shutil
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO

from components.errors import InputError
from components.storage.bucket import Bucket, Stored
from components.storage.checksum import file_crc32c
from components.storage.parallel import Meter, in_parallel
from components.storage.patience import Stopped

RANGE_BYTES = 16 << 20
BUFFER_BYTES = 1 << 20
ATTEMPTS = 3  # what arrived damaged is fetched again; three times in a row is no accident


def download(bucket: Bucket, objects: Mapping[Path, Stored], label: str) -> None:
    """Put every object at its path. Raises InputError for one that was replaced meanwhile or arrives damaged."""
    stop = threading.Event()
    meter = Meter(label, sum(found.size for found in objects.values()))
    remaining = [Part(bucket, found, target, meter, stop) for target, found in objects.items()]
    for _ in range(ATTEMPTS):
        in_parallel([partial(part.fetch, start) for part in remaining for start in part.begin()], stop)
        in_parallel([part.finish for part in remaining], stop)
        remaining = [part for part in remaining if not part.finished]
        if not remaining:
            return
    raise InputError(
        f"{bucket.address(remaining[0].found.name)}: what arrives has another crc32c than the object "
        f"({remaining[0].found.crc32c or 'none is stated'}), {ATTEMPTS} times in a row. Nothing was kept: check the "
        "network, the disk and any proxy between, then try again."
    )


class Part:
    """An object on its way: the file it grows in, and the note of the ranges that are complete."""

    def __init__(self, bucket: Bucket, found: Stored, target: Path, meter: Meter, stop: threading.Event) -> None:
        self.bucket, self.found, self.target, self.meter, self.stop = bucket, found, target, meter, stop
        self.file = target.with_name(f".{target.name}.part")
        self.note = target.with_name(f".{target.name}.part.jsonl")
        self.finished = target.is_file() and not found.zipped and self._is_whole(target)
        self._lock = threading.Lock()

    def begin(self) -> list[int]:
        """The first bytes of the ranges that are still to come; what lies there of another generation is dropped."""
        if self.finished:  # what a process left that died right after renaming goes too
            self.file.unlink(missing_ok=True)
            self.note.unlink(missing_ok=True)
            self.meter.add(self.found.size)
            return []
        done = self._noted()
        if done is None:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.note.unlink(missing_ok=True)
            with self.file.open("wb") as file:
                file.truncate(self.found.size)
            self.note.write_text(self._header() + "\n", encoding="utf-8")
            done = set()
        starts = range(0, self.found.size, RANGE_BYTES)
        self.meter.add(sum(self._end(start) - start for start in done))
        return [start for start in starts if start not in done]

    def fetch(self, start: int) -> None:
        """Download the range that begins at `start`; what arrived of it before a failure is not fetched again."""
        from google.api_core.exceptions import NotFound

        # a blob of its own, for it changes with every answer and belongs to one thread
        blob = self.bucket.place.blob(self.found.name, generation=self.found.generation)
        end, patience = self._end(start), self.bucket.patience
        with self.file.open("r+b", buffering=BUFFER_BYTES) as file:
            file.seek(start)
            window = _Window(file, start, end, self)

            def attempt() -> None:
                blob.download_to_file(
                    window, start=window.at, end=end - 1, raw_download=True, checksum=None, retry=None,
                    timeout=patience.timeout,
                )  # fmt: skip
                if window.at < end:
                    raise ConnectionError(f"the answer ended {end - window.at} bytes early")

            try:
                patience.insist(attempt, self.bucket.address(self.found.name), self.stop)
            except NotFound:
                raise InputError(
                    f"{self.bucket.address(self.found.name)}: was replaced or removed while it was being read. Try "
                    "again when nothing writes there."
                ) from None
        with self._lock, self.note.open("a", encoding="utf-8") as note:
            note.write(f"{start}\n")

    def finish(self) -> None:
        """Rename the file into place if its crc32c is the object's, unzipped where it was stored zipped."""
        if self.finished:
            return
        if self._is_whole(self.file):
            if self.found.zipped:
                self._unzip()
            self.file.replace(self.target)
            self.finished = True
        else:
            self.file.unlink()
        self.note.unlink()

    def _is_whole(self, path: Path) -> bool:
        return path.stat().st_size == self.found.size and file_crc32c(path) == self.found.crc32c

    def _end(self, start: int) -> int:
        return min(start + RANGE_BYTES, self.found.size)

    def _header(self) -> str:
        return json.dumps({"object": self.bucket.address(self.found.name), "generation": self.found.generation})

    def _noted(self) -> set[int] | None:
        """The first bytes of the ranges that are complete; None where the note is absent or of another generation."""
        if not self.file.is_file() or not self.note.is_file() or self.file.stat().st_size != self.found.size:
            return None
        header, *lines = self.note.read_text(encoding="utf-8").split("\n")
        whole = {int(line) for line in lines[:-1] if line.isdigit()}  # the last one is empty, or was being written
        return {start for start in whole if start % RANGE_BYTES == 0} if header == self._header() else None

    def _unzip(self) -> None:
        unzipped = self.file.with_suffix(".unzipped")
        with gzip.open(self.file) as source, unzipped.open("wb") as copy:
            shutil.copyfileobj(source, copy, BUFFER_BYTES)
        unzipped.replace(self.file)


class _Window:
    """The part of a file that a range is written to; the library writes to it what it receives."""

    def __init__(self, file: IO[bytes], start: int, end: int, part: Part) -> None:
        self.at, self._end, self._file, self._part = start, end, file, part

    def write(self, content: bytes) -> None:
        if self._part.stop.is_set():
            raise Stopped
        if self.at + len(content) > self._end:
            raise InputError(
                f"{self._part.bucket.address(self._part.found.name)}: the server sends more than the range it was "
                "asked for. Check what answers for it (STORAGE_EMULATOR_HOST, a proxy)."
            )
        self._file.write(content)
        self.at += len(content)
        self._part.meter.add(len(content))
