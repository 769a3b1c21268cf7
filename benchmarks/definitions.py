"""What a cluster objects to in a custom resource: its definition's structural schema, field by field.

As much of it as definitions use: types, required and unknown fields, enumerations, patterns, bounds, integers that may
be strings. Rules in CEL (x-kubernetes-validations) are not evaluated.
"""

import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
}  # fmt: skip


def schema(definition: Path, version: str) -> dict[str, Any]:
    """The schema of a version in a gzipped CustomResourceDefinition."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in Python takes half a minute
    found = yaml.load(gzip.decompress(definition.read_bytes()), Loader=loader)
    (served,) = [entry for entry in found["spec"]["versions"] if entry["name"] == version]
    found_schema: dict[str, Any] = served["schema"]["openAPIV3Schema"]
    return found_schema


def objections(value: Any, schema: dict[str, Any], place: str = "") -> Iterator[str]:
    """Every objection to a value, with where it is."""
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield f"{place} is {value!r}, neither a number nor a string"
        elif isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
            yield f"{place} is {value!r}, which {schema['pattern']} does not match"
        return
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        yield f"{place} is {value!r}, not of type {kind}"
        return
    yield from _about(value, schema, place)
    if kind == "object":
        yield from _fields(value, schema, place)
    if kind == "array":
        for number, item in enumerate(value):
            yield from objections(item, schema.get("items", {}), f"{place}[{number}]")


def _about(value: Any, schema: dict[str, Any], place: str) -> Iterator[str]:
    """What bounds of the value itself are passed."""
    if "enum" in schema and value not in schema["enum"]:
        yield f"{place} is {value!r}; accepted: {schema['enum']}"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{place} is {value!r}, which {schema['pattern']} does not match"
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{place} is {value}, below {schema['minimum']}"
    size = len(value) if isinstance(value, str | list) else 0
    if size > schema.get("maxLength", schema.get("maxItems", size)) or size < schema.get("minLength", 0):
        yield f"{place} has a length of {size}"


def _fields(value: dict[str, Any], schema: dict[str, Any], place: str) -> Iterator[str]:
    known, rest = schema.get("properties", {}), schema.get("additionalProperties")
    yield from (f"{place}.{name} is required" for name in schema.get("required", []) if name not in value)
    for name, inner in value.items():
        if name in known:
            yield from objections(inner, known[name], f"{place}.{name}")
        elif isinstance(rest, dict):
            yield from objections(inner, rest, f"{place}.{name}")
        elif known and not schema.get("x-kubernetes-preserve-unknown-fields"):
            yield f"{place}.{name} is unknown"
