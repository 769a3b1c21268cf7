"""What upload, deploy and infer tell each other: which version, under which digest, and where it is.

A published version is a folder: the model's files and its card README.md. Its digest is the one in that
folder's manifest, and it is the only name for a model from here on: in the pointer, in release.json, in
deployment.json, in the serving folder and in /healthz. The version is the digest's first digits.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from components.artifacts import read_json, write_json
from components.errors import InputError

VERSION_DIGITS = 12


def version_of(digest: str) -> str:
    """The name of the version with this digest."""
    return digest[:VERSION_DIGITS]


@dataclass(frozen=True)
class Release:
    """A published version (release.json)."""

    name: str
    """The model's name in the registry and towards clients."""
    version: str
    """The first digits of the digest."""
    uri: str
    """The folder or gs:// address of the version."""
    digest: str
    """The digest of the version's files."""
    model_version: str | None = None
    """The version's number in the MLflow registry; None without one."""

    def write(self, folder: Path) -> None:
        """Write release.json into the folder."""
        write_json(folder / "release.json", asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The release in a folder. Raises InputError when there is none or it is of another form."""
        return cls(**_fields(cls, folder / "release.json", "upload"))


@dataclass(frozen=True)
class Deployment:
    """What serves a version (deployment.json)."""

    target: str
    """local or kserve."""
    version: str
    """The first digits of the digest."""
    digest: str
    """The digest of the deployed files."""
    serving_dir: str | None = None
    """Target local: the folder that `plumbline serve` watches."""
    service: str | None = None
    """Target kserve: namespace/name of the InferenceService."""
    applied: bool = True
    """Whether the target has it now; a manifest written without a cluster waits to be applied."""

    def write(self, folder: Path) -> None:
        """Write deployment.json into the folder."""
        write_json(folder / "deployment.json", {k: v for k, v in asdict(self).items() if v is not None})

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The deployment in a folder. Raises InputError when there is none or it is of another form."""
        return cls(**_fields(cls, folder / "deployment.json", "deploy"))


def _fields(kind: type[Any], path: Path, step: str) -> dict[str, Any]:
    """The fields of a dataclass as a file states them."""
    found = read_json(path)
    known = kind.__dataclass_fields__
    if not isinstance(found, dict) or found.keys() - known.keys() or "digest" not in found:
        raise InputError(f"{path}: accepted: an object with {', '.join(known)}. Run {step} again.")
    return found
