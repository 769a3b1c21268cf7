"""The champion: the version of a model that is served, and what its evaluation found.

`<registry>/<name>/champion.json` names it. Deploy writes it when the version is served, and a rollback moves it. The
numbers lie in the version's folder, where upload put them, so they are the version's for good.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.artifacts import read_manifest
from components.errors import InputError
from components.release import version_of
from components.storage import get_text, is_remote, local_path, update_text

POINTER = "champion.json"
EVALUATION = "evaluation.json"
VERSIONS = "versions"


@dataclass(frozen=True)
class Champion:
    """The version that is served, and its numbers."""

    version: str
    """The first digits of its digest."""
    metrics: Mapping[str, float]
    """Means by metric, and by metric and category (`gold/helpful/fact`)."""


def evaluation_text(report: Mapping[str, Any]) -> str:
    """What a version keeps of its evaluation, from the content of report.json: the means that could be measured."""
    means: dict[str, Any] = {name: _mean(value) for name, value in report.get("metrics", {}).items()}
    for category, values in report.get("categories", {}).items():
        means |= {f"{name}/{category}": _mean(value) for name, value in values.items()}
    return json.dumps({name: mean for name, mean in means.items() if mean is not None}, indent=2) + "\n"


def read_champion(place: str) -> Champion | None:
    """The champion of the model whose versions lie at `place` (`<registry>/<name>`); None when none was served yet.

    Raises InputError when it is named there and its numbers are gone or of another form.
    """
    text = pointer_text(place)
    if text is None:
        return None
    try:
        pointer = json.loads(text)
        metrics = json.loads(get_text(f"{pointer['uri']}/{EVALUATION}").content or "")
        return Champion(str(pointer["version"]), {name: float(value) for name, value in metrics.items()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{place}/{POINTER}: names a version whose {EVALUATION} cannot be read. Deploy a version again, or remove "
            "the file: then there is no champion to beat."
        ) from None


def pointer_text(place: str) -> str | None:
    """The file that names the champion, as it is; None when there is none."""
    return get_text(f"{_address(place)}/{POINTER}").content


def name_champion(uri: str, digest: str) -> None:
    """Make the version at `uri` (`<registry>/<name>/versions/<version>`) the champion, unless it is."""
    place = uri.rsplit("/", 2)[0]
    text = json.dumps({"version": version_of(digest), "digest": digest, "uri": uri}, indent=2) + "\n"
    update_text(f"{place}/{POINTER}", lambda before: None if before == text else text)


def move_champion(version: Path) -> str | None:
    """Make a version that lies elsewhere, in a serving folder, the champion of the registry it is from.

    Gives the registry's address back; None where nothing is named champion there.
    """
    manifest = read_manifest(version)
    settings = manifest["settings"]
    if not {"registry", "name"} <= settings.keys():
        return None
    place = _address(f"{settings['registry'].rstrip('/')}/{settings['name']}")
    if pointer_text(place) is None:
        return None
    name_champion(f"{place}/{VERSIONS}/{version_of(manifest['digest'])}", manifest["digest"])
    return place


def _address(place: str) -> str:
    return place if is_remote(place) else str(local_path(place).absolute())


def _mean(value: Any) -> float | None:
    """A number, or the mean of an interval; None where there is none."""
    found = value.get("mean") if isinstance(value, Mapping) else value
    return float(found) if isinstance(found, int | float) else None
