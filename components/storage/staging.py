"""Where downloads go that nobody named a place for: a folder of the user's cache, so that one that was cut off goes on.

Each state of an address has a folder of its own, so what a process reads there is never replaced under it.
"""

import os
import tempfile
from pathlib import Path

from components.artifacts import json_digest


def staging_folder(address: str, generations: dict[str, int]) -> Path:
    """The folder for the objects of these generations; a new temporary one where there is no cache to write to."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        folder = cache / "plumbline" / json_digest([address, generations])[:16]
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError):  # a read-only file system, no home
        pass
    return Path(tempfile.mkdtemp(prefix="plumbline-"))
