"""YAML files, overlays and `key=value` overrides -> Settings.

Later layers win: class defaults < `-c` files from left to right < `key=value`. Files are merged key by key; a
list is replaced whole. A layer that names another member of a union (`rl.algorithm.name: ppo`) drops the keys
of earlier layers that the new member does not know; in the layer itself, or on the command line, such a key
is an error like any other unknown one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from components.errors import InputError
from components.parsing import Key, members, parse, tag_field, tagged
from components.storage import fetch, is_remote, local_path
from pipeline.documents import read_document, read_value
from pipeline.settings import TASKS, Settings

COMMAND_LINE = "on the command line"
CONFIGS = Path(__file__).parent / "configs"


def resolve(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Settings:
    """The settings that the files and the overrides describe together.

    Raises InputError for a missing or malformed file, and for a key that is unknown or has a value of the
    wrong type or range: it names the key, the value, where it was set and what is accepted.
    """
    layers = _Layers()
    for name in map(str, files):
        found = find_config(name)
        layers.add(read_document(found), f"in {name if is_remote(name) else found}")
    layers.add(_tree(overrides), COMMAND_LINE)
    return _with_champion(parse(Settings, _seeded(layers.tree), origin=layers.origin))


def amend(values: Mapping[str, Any], overrides: Sequence[str], where: str) -> tuple[dict[str, Any], Settings]:
    """Values of an earlier run with the overrides merged in, and the settings that they describe.

    `where` says in messages where the values are from. Raises InputError as `resolve` does.
    """
    layers = _Layers()
    layers.add(values, where)
    layers.add(_tree(overrides), COMMAND_LINE)
    settings = _with_champion(parse(Settings, layers.tree, origin=layers.origin))
    if settings.evaluate.champion is not None:
        layers.tree["evaluate"]["champion"] = settings.evaluate.champion
    return layers.tree, settings


def find_config(name: str) -> Path:
    """The file itself, fetched from gs://, or the packaged configuration of that name (`demo`).

    Raises InputError for none of them.
    """
    if is_remote(name):
        return fetch(name)
    path, packaged = local_path(name), CONFIGS / f"{name}.yaml"
    if path.is_file():  # a folder of a configuration's name does not hide it
        return path
    if packaged.is_file():
        return packaged
    names = ", ".join(sorted(config.stem for config in CONFIGS.glob("*.yaml")))
    raise InputError(f"{name}: no such configuration file; accepted: a YAML file, or one of ours by name: {names}.")


@dataclass
class _Layers:
    """The merged tree so far, and for each of its leaves the layer that set it."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)

    def add(self, layer: Mapping[str, Any], origin: str) -> None:
        """Merge a layer over the tree."""
        self._merge(self.tree, layer, (), [Settings], origin)

    def origin(self, key: Key) -> str:
        """Where a key was set, or what is nearest to it in the tree; empty for a default."""
        for length in range(len(key), 0, -1):
            for known, origin in self.origins.items():
                if known[:length] == key[:length]:
                    return origin
        return ""

    def _merge(
        self,
        below: dict[str, Any],
        layer: Mapping[str, Any],
        at: Key,
        models: list[type[BaseModel]],
        origin: str,
    ) -> None:
        chosen = tagged(models, layer.get(tag_field(models))) if len(models) > 1 else None
        if chosen is not None:
            for name in [name for name in below if name not in chosen.model_fields]:
                del below[name]
        for name, value in layer.items():
            key = (*at, name)
            if isinstance(value, Mapping):
                if not isinstance(below.get(name), dict):
                    below[name] = {}
                self._merge(below[name], value, key, _members_at(models, name), origin)
            else:
                below[name] = value
                self.origins = {k: v for k, v in self.origins.items() if k[: len(key)] != key}
                self.origins[key] = origin


def _members_at(models: list[type[BaseModel]], name: str) -> list[type[BaseModel]]:
    """The classes a key's value can have, looked up in every class that its holder can have."""
    found = [member for m in models if name in m.model_fields for member in members(m.model_fields[name].annotation)]
    return list(dict.fromkeys(found))


def _tree(overrides: Sequence[str]) -> dict[str, Any]:
    """The overrides as one nested mapping. Raises InputError for what is not `dotted.key=value`."""
    tree: dict[str, Any] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        parts = dotted.split(".")
        if not equals or not all(parts):
            hint = f" For a configuration file: -c {override}." if override.endswith((".yaml", ".yml")) else ""
            raise InputError(f"{override!r} is not an override; accepted: key=value, such as rl.rollouts=50.{hint}")
        place = tree
        for part in parts[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise InputError(f"{dotted} is set below a key that another override gives a value; keep one of them.")
        place[parts[-1]] = read_value(text, dotted)
    return tree


def _seeded(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with the common seed, where there is one, in every step that states none."""
    if tree.get("seed") is None:
        return tree
    seeded = dict(tree)
    for task in TASKS:
        given = seeded.get(task, None if task == "demo" else {})
        if isinstance(given, Mapping):
            seeded[task] = {"seed": tree["seed"], **given}
    return seeded


def _with_champion(settings: Settings) -> Settings:
    """The settings, thresholds over the champion knowing where it is published: where upload publishes."""
    evaluate, upload = settings.evaluate, settings.upload
    if evaluate.champion is not None or not any(bound.over for bound in evaluate.thresholds.values()):
        return settings
    place = f"{upload.registry.rstrip('/')}/{upload.name}"
    return settings.model_copy(update={"evaluate": evaluate.model_copy(update={"champion": place})})
