"""YAML as people mean it: `1e-5` is a number, and a key written twice is a mistake."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from components.errors import InputError


class _Loader(yaml.SafeLoader):
    """The safe loader of YAML 1.1, with 1.2's floats and without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.MarkedYAMLError(problem="a key is a list or a mapping", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is there twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_document(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; empty for an empty file. Raises InputError naming file and line."""
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML{_position(error)}.") from None
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise InputError(f"{path}: holds {str(document)[:60]!r}; accepted: a mapping of setting names to values.")
    return document


def read_value(text: str, key: str) -> Any:
    """The value after `key=`, as YAML. Raises InputError for text that is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{key} is {text!r}, which is not YAML{_position(error)}; quote it if it is text.") from None


def write_document(values: Any) -> str:
    """YAML in the order of the values."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _position(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f": {error}"
    mark = error.problem_mark
    return f" at line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
