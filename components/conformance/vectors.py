"""Golden vectors: inputs of a function and what it gives back, in float64, as JSON that any language reads.

`golden/<topic>.json` is a list of vectors. Numbers that JSON does not have are the strings "nan", "inf" and "-inf".
A result on tokens says nothing of places outside the vector's mask.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

GOLDEN_DIR = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Vector:
    """One golden vector; nested lists stand for tensors."""

    name: str
    """function/variant"""
    about: str
    """What makes it worth checking."""
    source: str
    """Where the formula stands."""
    inputs: dict[str, Any]
    """The function's arguments by name."""
    expected: list[Any]
    """What it gives back: one entry, or one per result."""
    gradients: dict[str, Any] = field(default_factory=dict)
    """The derivative of a scalar result by these inputs."""

    @property
    def function(self) -> str:
        """The name of the function that the vector is for."""
        return self.name.partition("/")[0]


def read_vectors(folder: Path = GOLDEN_DIR) -> list[Vector]:
    """All vectors of a folder, topic by topic."""
    return [
        Vector(**{name: _decoded(value) for name, value in row.items()})
        for path in sorted(folder.glob("*.json"))
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]


def write_vectors(path: Path, vectors: Sequence[Vector]) -> None:
    """Write one topic: a line per tensor, so that a changed number is a changed line."""
    path.write_text("[\n" + ",\n".join(_vector_lines(vector) for vector in vectors) + "\n]\n", encoding="utf-8")


def _vector_lines(vector: Vector) -> str:
    parts = []
    for item in fields(vector):
        value = getattr(vector, item.name)
        if isinstance(value, dict):
            inner = ",\n".join(f"      {json.dumps(key)}: {_dumps(tensor)}" for key, tensor in value.items())
            parts.append(f'    "{item.name}": {{\n{inner}\n    }}' if value else f'    "{item.name}": {{}}')
        else:
            parts.append(f'    "{item.name}": {_dumps(value)}')
    return "  {\n" + ",\n".join(parts) + "\n  }"


def _dumps(value: Any) -> str:
    return json.dumps(_encoded(value), ensure_ascii=False, allow_nan=False)


def _encoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_encoded(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _decoded(value: Any) -> Any:
    """Strings inside lists are the numbers that JSON does not have; elsewhere they are words."""
    if isinstance(value, dict):
        return {name: _decoded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [float(part) if isinstance(part, str) else _decoded(part) for part in value]
    return value
