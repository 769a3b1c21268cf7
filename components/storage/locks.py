"""One process at a time where several may write, on this machine or on a file system that machines share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Inside, no other process or thread is inside for the same file, which is made, empty, and stays.

    A file that is written and not the folder itself, for over NFS only those can be locked.
    """
    import fcntl

    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock, and so does the death of the process
