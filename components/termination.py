"""SIGTERM during training: the update at hand is finished, a checkpoint written, and the step ends with code 143.

Outside of `watch` the signal does what it does by default.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM


class Terminated(BaseException):
    """The step was asked to stop and has kept what it needs to continue; no error, so no `except Exception` ends it."""

    def __str__(self) -> str:
        return "stopped by SIGTERM after its checkpoint; the same command continues from there."


class Watch:
    """Whether the process was asked to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._at_once = False

    def check(self) -> None:
        """Raise Terminated if the process was asked to stop."""
        if self.requested:
            raise Terminated

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, SIGTERM raises Terminated at once, also one that came before."""
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._at_once:
            raise Terminated


@contextmanager
def watch() -> Iterator[Watch]:
    """Notes SIGTERM instead of dying of it; off the main thread, which has no signals, nothing."""
    noted = Watch()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = signal.signal(signal.SIGTERM, noted._asked)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)
