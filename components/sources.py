"""What a step reads from outside the pipeline, as digests: new data behind the same address is another digest.

The settings of a step that reads something list it in `sources()`, by key, kind and address. The kinds: a `file` or
folder; a `model`, which can also be a name that is no address; and the `champion` of a registry, if it has one.
"""

from collections.abc import Iterable, Iterator

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
    return {
        key: (pointer_text(address) or "none yet") if kind == "champion" else _digest(key, address)
        for key, kind, address in outside(task, settings, demo)
    }


def sourced_fingerprint(task: str, settings: StepSettings, code: str, demo: bool) -> str:
    """One digest over the code behind a task and its sources. Raises InputError as `source_digests` does."""
    return json_digest({"code": code, "sources": source_digests(task, settings, demo)})


def outside(task: str, settings: StepSettings, demo: bool) -> Iterator[tuple[str, str, str]]:
    """The key, kind and address of every source of a task's settings that is a file, a folder or a registry.

    A name on the Hugging Face hub is none, nor is a file that the demo task makes.
    """
    for name, kind, address in listed(settings):
        there = is_remote(address) or local_path(address).exists()
        if kind == "champion" or there or (kind == "file" and not demo):
            yield f"{task}.{name}", kind, address


def listed(settings: StepSettings) -> Iterable[tuple[str, str, str]]:
    """What a step reads from outside: key, kind and address of each; most steps read nothing."""
    return getattr(settings, "sources", tuple)()


def _digest(key: str, address: str) -> str:
    """The digest of what is at an address. Raises InputError naming the key when nothing is."""
    try:
        return fingerprint(address)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
