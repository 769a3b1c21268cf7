"""Which rows of each source are taken: every one, or as many as the sources' weights say."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from components.errors import InputError
from components.preprocess.dropped import Dropped
from components.preprocess.settings import Source
from components.records import Record


@dataclass(frozen=True)
class Pool:
    """The records of one source."""

    setting: str
    """Where the source stands in the settings, for messages: preprocess.prompts[0]."""
    source: Source
    records: list[Record]


def distinct(pools: Sequence[Pool], kind: str, dropped: Dropped) -> list[Pool]:
    """The pools without duplicates; of several equal records the first is kept."""
    seen: set[str] = set()
    result = []
    for pool in pools:
        kept = []
        for record in pool.records:
            if record.id in seen:
                dropped.add(kind, record.source, "duplicate")
            else:
                seen.add(record.id)
                kept.append(record)
        result.append(Pool(pool.setting, pool.source, kept))
    return result


def mix(pools: Sequence[Pool], kind: str, seed: int, dropped: Dropped) -> list[Record]:
    """The records of all pools in the proportions of their weights, as many as the scarcest source allows.

    Sources that are bound to one split keep their proportions among themselves: a test file does not limit
    the training files. Raises InputError when the weights ask for rows of a source that has none.
    """
    taken: list[Record] = []
    for split in (None, "train", "test"):
        group = [pool for pool in pools if pool.source.split == split]
        for pool, size in zip(group, _sizes(group), strict=True):
            chosen = _sample(pool, size, seed)
            taken += [pool.records[index] for index in sorted(chosen)]
            for index in set(range(len(pool.records))) - chosen:
                dropped.add(kind, pool.records[index].source, "weight")
    return taken


def shares(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """The largest numbers of rows in proportion to the weights that the sizes allow, rounded down."""
    scale = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    # The small term undoes rounding errors such as 10 / 0.3 * 0.3 = 9.999...
    return [min(size, math.floor(scale * weight + 1e-9)) for size, weight in zip(sizes, weights, strict=True)]


def _sizes(group: Sequence[Pool]) -> list[int]:
    sizes = [len(pool.records) for pool in group]
    if all(pool.source.weight is None for pool in group):
        return sizes
    for pool in group:
        if not pool.records:
            raise InputError(
                f"{pool.setting}: no row of {pool.source.path} is left after cleaning, so the weights cannot "
                "be followed. Remove the source or the weights."
            )
    return shares(sizes, [1.0 if pool.source.weight is None else pool.source.weight for pool in group])


def _sample(pool: Pool, size: int, seed: int) -> set[int]:
    """Numbers of `size` rows, drawn by seed and source alone: other sources do not change the draw."""
    return set(random.Random(f"{seed} {pool.source.path}").sample(range(len(pool.records)), size))
