"""Derivatives without a derivation: the complex step, and the elementary functions that let it through.

f(x + ih) = f(x) + ih f'(x) + O(h^2) for an analytic f, so f'(x) = Im f(x + ih) / h, exact to rounding because
nothing is subtracted (Squire and Trapp 1998, "Using complex variables to estimate derivatives of real functions").
Minimum, maximum and clamp choose by the real part.
"""

import cmath
import math
from collections.abc import Callable, Mapping
from typing import Any

STEP = 1e-30


def exp(x: complex) -> complex:
    """e^x, real for real x."""
    return cmath.exp(x) if isinstance(x, complex) else math.exp(x)


def minimum(x: complex, y: complex) -> complex:
    """The smaller one."""
    return x if x.real <= y.real else y


def maximum(x: complex, y: complex) -> complex:
    """The larger one."""
    return x if x.real >= y.real else y


def clamp(x: complex, low: float, high: float) -> complex:
    """`x` between two bounds; beyond them a constant."""
    return low if x.real < low else high if x.real > high else x


def log_sigmoid(x: complex) -> complex:
    """log(1 / (1 + e^-x)), without overflow on either side."""
    if x.real < 0:
        return x - _log1p(exp(x))
    return -_log1p(exp(-x))


def gradient(function: Callable[..., complex], inputs: Mapping[str, Any], name: str) -> Any:
    """The derivative of a scalar function of `inputs` by every number of one of them, in that one's shape."""
    return _derivatives(lambda changed: function(**{**inputs, name: changed}), inputs[name])


def _derivatives(function: Callable[[Any], complex], numbers: Any) -> Any:
    """Of a function of nested lists, one number after the other."""
    if not isinstance(numbers, list):
        return function(complex(numbers, STEP)).imag / STEP
    return [
        _derivatives(lambda part, at=at: function([*numbers[:at], part, *numbers[at + 1 :]]), number)  # type: ignore[misc]
        for at, number in enumerate(numbers)
    ]


def _log1p(x: complex) -> complex:
    """log(1 + x) for a non-negative real part; the imaginary part is the step's."""
    return complex(math.log1p(x.real), x.imag / (1 + x.real)) if isinstance(x, complex) else math.log1p(x)
