"""Local paths and gs:// addresses behind a few verbs, on google-cloud-storage.

What is transferred is checked by crc32c both ways, tried again where the network or the store fails for a moment, and
appears under its name when it is whole. A text that several processes write is written by compare-and-swap.
"""

from components.storage.addresses import is_remote, local_path, refuse_remote
from components.storage.bucket import Overtaken
from components.storage.folders import (
    fetch,
    fingerprint,
    is_file,
    list_folders,
    list_names,
    new_folder,
    put_folder,
    remove,
)  # fmt: skip
from components.storage.texts import Text, get_text, put_text, update_text

__all__ = [
    "Overtaken", "Text", "fetch", "fingerprint", "get_text", "is_file", "is_remote", "list_folders", "list_names",
    "local_path", "new_folder", "put_folder", "put_text", "refuse_remote", "remove", "update_text",
]  # fmt: skip
