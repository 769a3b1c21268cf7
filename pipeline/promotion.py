"""What a run leaves outside its own folder: the published version, and what is served.

Both can be gone or replaced while the cache still says that they were put there. A run asks before it believes.
"""

import json
from pathlib import Path
from typing import Any

from components.artifacts import read_json, verify_manifest
from components.sources import outside
from components.storage import get_text, is_remote, local_path
from pipeline.settings import Settings

RELEASE = "release/release.json"
DEPLOYMENT = "deployment/deployment.json"


def anchored(settings: Settings) -> Settings:
    """The settings with the addresses of sources, checkpoints, champion, upload and deploy as absolute paths.

    A run from another folder then has another cache key, what was cached is looked for where it was put, and a step
    that works in another folder finds its files.
    """
    values = settings.model_dump()
    for task in settings.tasks():
        for key, _, address in outside(task, settings.step(task), demo=settings.demo is not None):
            _assign(values, key, _absolute(address))
    if settings.checkpoints:
        _assign(values, "checkpoints", _absolute(settings.checkpoints))
    _assign(values, "upload.registry", _absolute(settings.upload.registry))
    _assign(values, "deploy.serving_dir", _absolute(settings.deploy.serving_dir))
    return Settings.model_validate(values)


def stands(task: str, folder: Path) -> bool:
    """Whether what a cached task once did to the world outside is still so; true of tasks that did nothing there.

    Every published file is read again. Object stores and clusters are not asked: their state is theirs to keep.
    """
    try:
        if task == "upload":
            return _is_published(folder / RELEASE)
        if task == "deploy":
            return _is_served(folder / DEPLOYMENT)
    except (OSError, KeyError, TypeError, ValueError):  # gone, unreadable or of another form; InputError too
        return False
    return True


def _assign(values: Any, key: str, address: str) -> None:
    """Put an address at a dotted key, such as preprocess.prompts.0.path."""
    *above, last = key.split(".")
    for part in above:
        values = values[int(part) if part.isdecimal() else part]
    values[last] = address


def _absolute(address: str) -> str:
    return address if is_remote(address) else str(local_path(address).absolute())


def _is_published(path: Path) -> bool:
    """Whether the version has its files, and is the candidate."""
    release = read_json(path)
    if is_remote(release["uri"]):
        return True
    version = Path(release["uri"])
    pointer = json.loads(get_text(str(version.parent.parent / "candidate.json")).content or "{}")
    return bool(pointer["digest"] == release["digest"] == verify_manifest(version))


def _is_served(path: Path) -> bool:
    """Whether the serving folder points at the version, and has its files."""
    from components.serving.folder import read_pointer

    deployment = read_json(path)
    if deployment["target"] != "local":
        return True
    serving = Path(deployment["serving_dir"])
    pointer = read_pointer(serving)
    return bool(pointer.digest == deployment["digest"] == verify_manifest(serving / pointer.path))
