"""Publishing a model that passed: the version first, the registry next, the pointer last.

`<registry>/<name>/versions/<version>/` holds a version, `<registry>/<name>/candidate.json` says which is the
newest. Whoever follows the pointer finds a whole version, whatever happened in the middle of an upload.
"""

import json
import logging
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.artifacts import MANIFEST, Metrics, ModelCard, read_json, verify_manifest, write_manifest
from components.champion import EVALUATION, evaluation_text
from components.errors import InputError
from components.registry import register
from components.release import Release, version_of
from components.storage import get_text, is_remote, local_path, put_folder, update_text
from components.upload.card import model_card
from components.upload.settings import UploadSettings

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"


def run(settings: UploadSettings, *, model: Path, report: Path, release: Path) -> Metrics:
    """Publish `model` under its digest; writes release.json to `release`.

    Raises InputError when the report did not pass, or the model's files are not those its manifest lists.
    """
    evaluation = _passed(report)
    verify_manifest(model)
    if (kind := ModelCard.read(model).kind) != "policy":
        raise InputError(
            f"{model}: a {kind} model; only a policy is published. Give upload the rl step's model."
        )
    place = _address(settings)
    with tempfile.TemporaryDirectory(prefix="plumbline-") as scratch:
        staged = Path(scratch)
        _stage(settings, model, report, evaluation, staged)
        digest = _describe(settings, model, report, staged)
        version = version_of(digest)
        published = Release(settings.name, version, f"{place}/versions/{version}", digest)
        new = not _is_published(published, place)
        if new:
            put_folder(staged, published.uri)
        size = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
    number = register(settings.name, published.uri, digest)
    _point(published, place)
    release.mkdir(parents=True, exist_ok=True)
    replace(published, model_version=number).write(release)
    parents = {"model": model, "report": report}
    write_manifest(release, "release", settings=settings.model_dump(mode="json"), parents=parents)
    logger.info("upload: %s %s %s", published.uri, "published" if new else "was published before", digest)
    return {"upload/megabytes": size / 1e6, "upload/new": float(new)}


def _passed(report: Path) -> dict[str, Any]:
    """The content of the report. Raises InputError unless it says that the model passed."""
    path = report / "report.json"
    evaluation = read_json(path)
    passed = evaluation.get("passed") if isinstance(evaluation, dict) else None
    if passed is not True:
        raise InputError(
            f"{path}: 'passed' is {passed!r}; only a model whose evaluation passed is published. "
            "Look at report.html beside it, then train further or change evaluate's thresholds."
        )
    assert isinstance(evaluation, dict)
    return evaluation


def _address(settings: UploadSettings) -> str:
    """Where the model's versions and its pointer lie; absolute when local, so that others find it too."""
    registry = settings.registry.rstrip("/")
    return f"{registry if is_remote(registry) else local_path(registry or '/').absolute()}/{settings.name}"


def _stage(
    settings: UploadSettings, model: Path, report: Path, evaluation: dict[str, Any], staged: Path
) -> None:
    """Put the version together: links to the model's files, which may be large, the card and the numbers."""
    for path in sorted(model.rglob("*")):
        name = path.relative_to(model)
        if path.is_dir():
            (staged / name).mkdir()
        elif name.as_posix() not in (MANIFEST, CARD_FILE, EVALUATION):
            (staged / name).symlink_to(path.resolve())
    (staged / CARD_FILE).write_text(model_card(settings.name, model, report, evaluation), encoding="utf-8")
    (staged / EVALUATION).write_text(evaluation_text(evaluation), encoding="utf-8")


def _describe(settings: UploadSettings, model: Path, report: Path, staged: Path) -> str:
    """Write the version's manifest; returns the digest."""
    parents = {"model": model, "report": report}
    return write_manifest(staged, "version", settings=settings.model_dump(mode="json"), parents=parents)


def _is_published(version: Release, place: str) -> bool:
    """Whether the version is there as a whole already.

    A local one is read again. On gs:// an interrupted upload leaves some of the files, and only a version
    that the pointer has named is known to be whole; of any other the files that are missing or differ are written.
    """
    if not is_remote(version.uri):
        try:
            return verify_manifest(Path(version.uri)) == version.digest
        except InputError:
            return False
    return _names(get_text(f"{place}/candidate.json").content, version)


def _point(version: Release, place: str) -> None:
    """Name the version in the pointer, unless it is named there; of two uploads at once the later one is the newest."""

    def named(pointer: str | None) -> str | None:
        if _names(pointer, version):
            return None
        fields = {
            "version": version.version,
            "digest": version.digest,
            "uri": version.uri,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return json.dumps(fields, indent=2) + "\n"

    update_text(f"{place}/candidate.json", named)


def _names(pointer: str | None, version: Release) -> bool:
    """Whether the content of the pointer names the version."""
    return bool(json.loads(pointer or "{}").get("digest") == version.digest)
