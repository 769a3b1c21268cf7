"""Stand-ins for what a measured step loads and could do without, where it is not installed.

A machine with a GPU may hold torch, transformers and accelerate alone. What is imported before any component then finds

- pydantic: settings as plain objects with the defaults of their classes; nothing is checked, but an unknown name is
  refused. The benchmarks state every setting in code.
- pyarrow: tables of data folders as JSON, one file each.
- plumbline itself: the version "not installed".
"""

import json
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from inspect import get_annotations
from pathlib import Path
from types import ModuleType
from typing import Any

ABSENT = object()


class Default:
    """What `Field` gives: the default, if there is one."""

    def __init__(self, default: Any = ABSENT, **_: Any) -> None:
        self.default = default


class Plain:
    """In place of pydantic's BaseModel: the values given, and the classes' defaults for all others."""

    def __init__(self, **given: Any) -> None:
        for name in self._names():
            default = getattr(type(self), name, ABSENT)
            value = given.pop(name, default.default if isinstance(default, Default) else default)
            if value is ABSENT:
                raise TypeError(f"{type(self).__name__} needs {name}")
            setattr(self, name, value)
        if given:
            raise TypeError(f"{type(self).__name__} has no {', '.join(given)}")

    def model_dump(self, **_: Any) -> dict[str, Any]:
        """The values by name, settings inside them likewise."""
        return {
            name: value.model_dump() if isinstance(value := getattr(self, name), Plain) else value
            for name in self._names()
        }

    @classmethod
    def _names(cls) -> list[str]:
        """The names that the class and those above it annotate."""
        return list(dict.fromkeys(name for owner in reversed(cls.__mro__) for name in get_annotations(owner)))


def stand_in() -> None:
    """Put a stand-in for everything that is missing where an import finds it."""
    if find_spec("pydantic") is None:
        _install(
            "pydantic",
            BaseModel=Plain,
            Field=Default,
            ConfigDict=dict,
            AfterValidator=Default,
            model_validator=lambda **_: lambda method: method,
            ValidationError=ValueError,
        )
        _install("pydantic_core", ErrorDetails=dict)
    if find_spec("pyarrow") is None:
        _tables_as_json()
    if not _is_installed("plumbline"):
        from components import artifacts

        setattr(artifacts, "version", lambda name: "not installed")  # noqa: B010  a name that it imports


def _install(name: str, **content: Any) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


def _tables_as_json() -> None:
    """Let data folders hold <kind>/<split>.json in place of tables."""
    from components.artifacts import DataDir, write_json, write_manifest
    from components.records import KINDS, SPLITS, to_row

    def write(path: Path, records: Mapping[tuple[str, str], Any], settings: Any, parents: Any) -> DataDir:
        for kind in KINDS:
            for split in SPLITS:
                write_json(path / kind / f"{split}.json", [to_row(row) for row in records.get((kind, split), ())])
        write_manifest(path, "data", settings=settings, parents=parents)
        return DataDir(path)

    def rows(data: DataDir, kind: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(json.loads((data.path / kind / f"{split}.json").read_text("utf-8")), start=1):
            yield f"{kind}/{split} row {number}", row

    setattr(DataDir, "write", write)  # noqa: B010  by name: it is a class method there
    setattr(DataDir, "rows", rows)  # noqa: B010


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


stand_in()
