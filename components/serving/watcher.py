"""Follows the pointer of the serving folder and puts the version it names on stage."""

import logging
import threading
from pathlib import Path

from components.serving.folder import POINTER, read_pointer
from components.serving.model import Stage, load_version

logger = logging.getLogger(__name__)

POLL_S = 1.0
Stamp = tuple[int, int]


class Watcher:
    """Looks at the pointer every second, in a thread of its own.

    A new version is loaded beside the old one, which goes on answering; requests in flight keep the model
    they began with. A version that cannot be loaded is refused once, until the pointer is written again.
    """

    def __init__(self, folder: Path, stage: Stage) -> None:
        self._folder, self._stage = folder, stage
        self._stamp: Stamp | None = None  # unknown: the pointer may have moved on while the first model was loaded
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Stop looking; a version being loaded is not waited for."""
        self._stopping.set()

    def look(self) -> None:
        """Exchange the model if the pointer was written since the last look and names another version."""
        stamp = self._read_stamp()
        if stamp is None or stamp == self._stamp:
            return
        self._stamp = stamp
        serving = self._stage.current
        try:
            pointer = read_pointer(self._folder)
            if (pointer.name, pointer.digest) != (serving.name, serving.digest):
                self._stage.current = load_version(self._folder, pointer)
                logger.info("now serving %s (before: %s)", pointer.version, serving.version)
        except Exception as error:  # whatever is wrong with the new version, the old one keeps answering
            logger.error("the new version is refused, %s is served on: %s", serving.version, error)

    def _read_stamp(self) -> Stamp | None:
        """What changes when the pointer is replaced; None while there is none."""
        try:
            status = (self._folder / POINTER).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino

    def _watch(self) -> None:
        while not self._stopping.wait(POLL_S):
            self.look()
