"""Rows in an endless sequence of shuffled passes that depends on the seed alone."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Generic, TypeVar

import torch

Row = TypeVar("Row")


class Stream(Generic[Row]):
    """Every pass has each row once, in another order; where one stands is a number, so nothing has to be saved."""

    def __init__(self, rows: Sequence[Row], seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def batch(self, number: int, size: int) -> list[Row]:
        """The `size` rows of batch `number` (0-based)."""
        return [self.rows[index] for index in self.indices(number, size)]

    def indices(self, number: int, size: int) -> list[int]:
        """Where the rows of batch `number` stand among all rows."""
        return [self._at(place) for place in range(number * size, (number + 1) * size)]

    def _at(self, place: int) -> int:
        epoch, index = divmod(place, len(self.rows))
        return self._order(epoch)[index]

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.rows), generator=generator).tolist()
