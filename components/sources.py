"""What a step reads from outside the pipeline, as digests: new data behind the same address is another digest.

The settings of a step that reads something list it in `sources()`, by key, kind and address. The kinds: a `file` or
folder; a `model`, which can also be a name that is no address; and the `champion` of a registry, if it has one.
"""

from collections.abc import Iterable

from components.artifacts import json_digest
from components.champion import pointer_text
from components.errors import InputError
from components.settings import StepSettings
from components.storage import fingerprint, is_remote, local_path


def source_digests(task: str, settings: StepSettings, demo: bool) -> dict[str, str]:
    """The digest of every source of a task's settings, by key.

    In the demo world (`demo`) a file that is not there is one that the demo task makes, and has no digest. Raises
    InputError naming the key of a source that is not there.
    """
    digests = {}
    for name, kind, address in listed(settings):
        key = f"{task}.{name}"
        if kind == "champion":
            digests[key] = pointer_text(address) or "none yet"
        elif kind == "model" and not (is_remote(address) or local_path(address).is_dir()):
            continue  # a name on the Hugging Face hub
        elif not demo or is_remote(address) or local_path(address).exists():
            digests[key] = _digest(key, address)
    return digests


def sourced_fingerprint(task: str, settings: StepSettings, code: str, demo: bool) -> str:
    """One digest over the code behind a task and its sources. Raises InputError as `source_digests` does."""
    return json_digest({"code": code, "sources": source_digests(task, settings, demo)})


def listed(settings: StepSettings) -> Iterable[tuple[str, str, str]]:
    """What a step reads from outside: key, kind and address of each; most steps read nothing."""
    return getattr(settings, "sources", tuple)()


def _digest(key: str, address: str) -> str:
    """The digest of what is at an address. Raises InputError naming the key when nothing is."""
    try:
        return fingerprint(address)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
