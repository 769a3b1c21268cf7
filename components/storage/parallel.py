"""Many parts of a transfer at once, in threads: the first that fails ends them all."""

import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed

from components.progress import Progress

WORKERS = 8  # below the ten connections that requests keeps open; more gain nothing on one machine's network
LONG_BYTES = 64_000_000  # some seconds on a good network: from here on a person wants to see it move
MEGABYTE = 1_000_000


def in_parallel(tasks: Iterable[Callable[[], None]], stop: threading.Event) -> None:
    """Do all tasks, some of them at a time. Raises what the first failing one does, after `stop` ended the others."""
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="storage")
    try:
        for future in as_completed([pool.submit(task) for task in tasks]):
            future.result()
    except BaseException:  # KeyboardInterrupt and SIGTERM too
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class Meter:
    """Counts the bytes of a transfer and shows the progress of a long one, in megabytes."""

    def __init__(self, label: str, total: int) -> None:
        """`total` in bytes."""
        self.bytes, self.total = 0, total
        self._lock = threading.Lock()
        self._progress = Progress(f"{label} MB", math.ceil(total / MEGABYTE)) if total >= LONG_BYTES else None

    def add(self, count: int) -> None:
        """Count bytes that were transferred, or found to be there already."""
        with self._lock:
            self.bytes = min(self.bytes + count, self.total)  # what was damaged is transferred twice
            if self._progress is not None:
                shown = math.ceil(self.bytes / MEGABYTE) if self.bytes == self.total else self.bytes // MEGABYTE
                if shown > self._progress.done:
                    self._progress.advance(shown - self._progress.done)
