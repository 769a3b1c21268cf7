"""Whole numbers in given proportions: how many rows of each sort a file has."""

import random
from collections.abc import Mapping
from typing import TypeVar

K = TypeVar("K")


def shares_of(total: int, shares: Mapping[K, float]) -> dict[K, int]:
    """How many of `total` fall to each key: in proportion to the shares, adding up to `total` exactly.

    Largest remainders are rounded up; ties go to the earlier key.
    """
    whole = sum(shares.values())
    exact = {key: total * share / whole for key, share in shares.items()}
    counts = {key: int(amount) for key, amount in exact.items()}
    by_remainder = sorted(exact, key=lambda key: counts[key] - exact[key])
    for key in by_remainder[: total - sum(counts.values())]:
        counts[key] += 1
    return counts


def shuffled(counts: Mapping[K, int], rng: random.Random) -> list[K]:
    """Each key as often as its count says, in random order."""
    keys = [key for key, count in counts.items() for _ in range(count)]
    rng.shuffle(keys)
    return keys
