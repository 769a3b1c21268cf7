"""What a cluster objects to in a custom resource, in its place: the structural schema of the resource's definition.

Rules in CEL (x-kubernetes-validations) are not evaluated.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

KEPT = "x-kubernetes-preserve-unknown-fields"
INT_OR_STRING = "x-kubernetes-int-or-string"


def schema(definition: Path, version: str) -> dict[str, Any]:
    """The JSON schema of a version in a gzipped CustomResourceDefinition; a field it does not know is a mistake."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in Python takes half a minute
    found = yaml.load(gzip.decompress(definition.read_bytes()), Loader=loader)
    (served,) = [entry for entry in found["spec"]["versions"] if entry["name"] == version]
    return dict(_strict(served["schema"]["openAPIV3Schema"]))


def objections(value: Any, schema: dict[str, Any]) -> Iterator[str]:
    """Every objection to a value, with where it is: `.spec.trainer.numNodes: '2' is not of type 'integer'`."""
    for error in Draft202012Validator(schema).iter_errors(value):
        yield f"{error.json_path.removeprefix('$')}: {error.message}"


def _strict(schema: Any) -> Any:
    """The schema with Kubernetes' own words as JSON schema has them."""
    if isinstance(schema, list):
        return [_strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: _strict(inner) for name, inner in schema.items()}
    if schema.get(INT_OR_STRING) is True:
        made["type"] = ["integer", "string"]
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not schema.get(KEPT):
        made.setdefault("additionalProperties", False)
    return made
