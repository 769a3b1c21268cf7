"""Golden vectors against a library: the largest difference of each, and what it means.

A library is a module with functions of the vectors' names. They take tensors and plain values by keyword and give
back a tensor, a number, or a tuple of them; a function that does not know a variant raises NotImplementedError with
the reason. `DIFFERENCES` names vectors that come out differently on purpose, and why.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from components.conformance.vectors import Vector
from components.errors import InputError

LIBRARIES = {"ours": "components.conformance.ours", "trl": "components.conformance.trl"}
TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-4}
"""What rounding explains: weights and epsilons are float32 and 1e-8."""

Status = Literal["pass", "FAIL", "differs", "not offered"]


@dataclass(frozen=True)
class Outcome:
    """What a library made of a vector."""

    vector: Vector
    status: Status
    error: float = math.nan
    """The largest difference of a number from what is expected, as a share of it where it is above 1."""
    reason: str = ""

    @property
    def absent(self) -> bool:
        """Whether the library has no such function at all."""
        return self.status == "not offered" and not self.reason


def load_library(name: str) -> ModuleType:
    """The module of a name: ours, trl, or package.module. Raises InputError for one that cannot be used."""
    try:
        return import_module(LIBRARIES.get(name, name))
    except Exception as error:  # a module of somebody else's may raise anything
        advice = "Install the dev extra." if name == "trl" else "Install it, or put its folder on PYTHONPATH."
        raise InputError(
            f"--against is {name!r}, which cannot be imported: {type(error).__name__}: {error}. {advice}"
        ) from None


def check_vectors(library: ModuleType, vectors: Sequence[Vector], dtype: torch.dtype) -> list[Outcome]:
    """The outcome of every vector.

    Raises InputError for a module that offers none of the functions, or excuses what does not exist.
    """
    names = sorted({vector.function for vector in vectors})
    if not any(callable(getattr(library, name, None)) for name in names):
        raise InputError(
            f"--against: {library.__name__} has none of the functions {', '.join(names)}. "
            "plumbline conformance --functions prints their arguments."
        )
    differences = declared_differences(library, vectors)
    outcomes = []
    for vector in vectors:
        function = getattr(library, vector.function, None)
        reason = differences.get(vector.name, differences.get(vector.function, ""))
        if callable(function):
            outcomes.append(check_vector(function, vector, dtype, reason))
        else:
            outcomes.append(Outcome(vector, "not offered"))
    return outcomes


def declared_differences(library: ModuleType, vectors: Sequence[Vector]) -> Mapping[str, str]:
    """What differs on purpose, by vector or function. Raises InputError for names that are neither."""
    declared = getattr(library, "DIFFERENCES", {})
    key = f"--against: {library.__name__}.DIFFERENCES"
    known = {name for vector in vectors for name in (vector.name, vector.function)}
    if not isinstance(declared, Mapping) or not all(isinstance(reason, str) for reason in declared.values()):
        raise InputError(f"{key} is {declared!r}; accepted: vector names to reasons.")
    for name in declared:
        if name not in known:
            raise InputError(
                f"{key} names {name!r}, which is no vector; accepted: function, or "
                "function/vector, as plumbline conformance prints them."
            )
    return declared


def check_vector(function: Callable[..., Any], vector: Vector, dtype: torch.dtype, difference: str = "") -> Outcome:
    """The outcome of one function: its results, and the gradient of the first one.

    `difference` says why other numbers are meant; it excuses no exception.
    """
    inputs = {name: as_argument(value, dtype) for name, value in vector.inputs.items()}
    for name in vector.gradients:
        inputs[name].requires_grad_()
    try:
        found = function(**inputs)
        results = list(found) if isinstance(found, tuple) else [found]
        gradients = _gradients(results[0], [inputs[name] for name in vector.gradients])
    except NotImplementedError as missing:
        return Outcome(vector, "not offered", reason=str(missing) or "this variant")
    except Exception as error:  # another person's code: whatever it raises is a finding, not our failure
        return Outcome(vector, "FAIL", math.inf, f"{type(error).__name__}: {error}")
    expected = [*vector.expected, *vector.gradients.values()]
    if len(results) != len(vector.expected):
        return Outcome(vector, "FAIL", math.inf, f"{len(results)} results; expected {len(vector.expected)}")
    masks = [inputs.get("mask")] * len(results) + [None] * len(gradients)  # a gradient is 0 outside, never nan
    errors = [largest_error(*each) for each in zip([*results, *gradients], expected, masks, strict=True)]
    largest = max(errors)
    if largest <= TOLERANCES[dtype]:
        return Outcome(vector, "pass", largest)
    if difference:
        return Outcome(vector, "differs", largest, difference)
    parts = ["result"] * len(results) + [f"gradient by {name}" for name in vector.gradients]
    return Outcome(vector, "FAIL", largest, f"{parts[errors.index(largest)]} is off")


def largest_error(found: Any, expected: Any, mask: Tensor | None) -> float:
    """The largest difference, as a share where the value is above 1; infinite for nan and for another shape."""
    seen = found.detach().double() if isinstance(found, Tensor) else torch.tensor(found, dtype=torch.float64)
    right = torch.as_tensor(expected, dtype=torch.float64)
    if seen.shape != right.shape:
        return math.inf
    gaps = (seen - right).abs() / right.abs().clamp(min=1)
    if mask is not None and gaps.shape == mask.shape:
        gaps = gaps[mask]
    return float(gaps.nan_to_num(nan=math.inf).max())


def as_argument(value: Any, dtype: torch.dtype) -> Any:
    """A nested list as a tensor: booleans and whole numbers as they are, others in `dtype`."""
    if not isinstance(value, list):
        return value
    tensor = torch.tensor(value, dtype=torch.float64) if _has_float(value) else torch.tensor(value)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _has_float(value: Any) -> bool:
    return any(map(_has_float, value)) if isinstance(value, list) else isinstance(value, float)


def _gradients(result: Any, by: Sequence[Tensor]) -> list[Tensor]:
    """The derivatives of a scalar tensor."""
    if not by:
        return []
    return list(torch.autograd.grad(result, by))
