"""Inputs for golden vectors: reproducible numbers, ragged masks, and padding that holds what it should not."""

import itertools
import math
import random
from collections.abc import Sequence

LENGTHS = (1, 4, 6, 3)
"""Tokens of the responses of a batch, the shortest possible among them."""
WIDTH = 6
FINITE = (7000.0, -500000.0, 123.25)
NOT_FINITE = (math.nan, math.inf, -math.inf)

Rows = list[list[float]]
Mask = list[list[bool]]


def numbers(seed: int, count: int, low: float = -1.0, high: float = 1.0) -> list[float]:
    """Uniform numbers with four decimals."""
    generator = random.Random(seed)
    return [round(low + (high - low) * generator.random(), 4) for _ in range(count)]


def rows(seed: int, low: float = -1.0, high: float = 1.0, count: int = len(LENGTHS)) -> Rows:
    """Uniform numbers (B, R)."""
    flat = numbers(seed, count * WIDTH, low, high)
    return [flat[start : start + WIDTH] for start in range(0, len(flat), WIDTH)]


def added(first: Rows, second: Rows) -> Rows:
    """The sums, rounded as their terms are."""
    return [
        [round(a + b, 4) for a, b in zip(one, other, strict=True)] for one, other in zip(first, second, strict=True)
    ]


def ragged(lengths: Sequence[int] = LENGTHS) -> Mask:
    """A mask (B, R) that is true on each row's first tokens."""
    return [[place < length for place in range(WIDTH)] for length in lengths]


def dirty(values: Rows, mask: Mask, rubbish: Sequence[float] = FINITE) -> Rows:
    """The values with rubbish outside the mask, in turn."""
    fill = itertools.cycle(rubbish)
    return [
        [value if inside else next(fill) for value, inside in zip(row, places, strict=True)]
        for row, places in zip(values, mask, strict=True)
    ]
