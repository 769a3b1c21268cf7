"""What a run leaves outside its own folder: the published version, and what is served.

Both can be gone or replaced while the cache still says that they were put there. A run asks before it believes.
"""

from pathlib import Path

from components.artifacts import read_json, read_manifest
from components.errors import InputError
from components.storage import is_remote

RELEASE = "release/release.json"
DEPLOYMENT = "deployment/deployment.json"


def stands(task: str, folder: Path) -> bool:
    """Whether what a cached task once did to the world outside is still so; true of tasks that did nothing there.

    Object stores and clusters are not asked: their state is theirs to keep.
    """
    try:
        if task == "upload":
            return _is_published(folder / RELEASE)
        if task == "deploy":
            return _is_served(folder / DEPLOYMENT)
    except InputError:
        return False
    return True


def _is_published(path: Path) -> bool:
    release = read_json(path)
    if is_remote(release["uri"]):
        return True
    return bool(read_manifest(Path(release["uri"]))["digest"] == release["digest"])


def _is_served(path: Path) -> bool:
    from components.serving.folder import read_pointer

    deployment = read_json(path)
    if deployment["target"] != "local":
        return True
    return bool(read_pointer(Path(deployment["serving_dir"])).digest == deployment["digest"])
