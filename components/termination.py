"""SIGTERM while a step runs: outside training it ends at once, inside training with a checkpoint after the update.

Either way the exit code is 143. What is not watched dies of the signal, as by default.
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
        return "stopped by SIGTERM; the same command continues from the newest checkpoint, where there is one."


class Watch:
    """Whether the process was asked to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._at_once = False

    def dismiss(self) -> None:
        """It is too late to stop: all that was to be kept is kept."""
        self.requested = False

    def check(self) -> None:
        """Raise Terminated if the process was asked to stop."""
        if self.requested:
            raise Terminated

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, SIGTERM raises Terminated at once, also one that came before."""
        with self._set(at_once=True):
            self.check()
            yield

    @contextmanager
    def _set(self, at_once: bool) -> Iterator[None]:
        before, self._at_once = self._at_once, at_once
        try:
            yield
        finally:
            self._at_once = before

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._at_once:
            raise Terminated


_active: Watch | None = None


@contextmanager
def watch() -> Iterator[Watch]:
    """Notes SIGTERM instead of dying of it; off the main thread, which has no signals, nothing.

    Inside another watch it is that one, and SIGTERM is noted only, until the block ends.
    """
    global _active
    if threading.current_thread() is not threading.main_thread():
        yield Watch()
    elif _active is not None:
        outer = _active
        with outer._set(at_once=False):
            yield outer
        if outer._at_once:
            outer.check()
    else:
        _active = Watch()
        before = signal.signal(signal.SIGTERM, _active._asked)
        try:
            yield _active
        finally:
            signal.signal(signal.SIGTERM, before)
            _active = None
