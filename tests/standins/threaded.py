"""Threads in the place of processes that train together: what they tell one another, without starting any."""

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from components.group import Group

Result = TypeVar("Result")
LIMIT_S = 60.0


class Threads(Group):
    """One of several threads, which meet at a barrier instead of a network."""

    def __init__(self, rank: int, table: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.table, self.barrier_of_all = rank, len(table), table, barrier

    def gathered(self, value: Result) -> list[Result]:
        """The value of every thread, each its own copy."""
        self.table[self.rank] = value
        self.barrier_of_all.wait(LIMIT_S)
        found = copy.deepcopy(self.table)
        self.barrier_of_all.wait(LIMIT_S)  # before anybody writes again
        return found

    def first(self, work: Callable[[], Result]) -> Result:
        """What `work` gives the first thread."""
        return self.gathered(work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Make every tensor the sum of all threads', in place."""
        for parts in zip(tensors, *self.gathered([tensor.detach().clone() for tensor in tensors]), strict=True):
            with torch.no_grad():
                parts[0].copy_(sum(parts[2:], start=parts[1]))

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Make every tensor the first thread's, in place."""
        for tensor, given in zip(tensors, self.gathered([t.detach().clone() for t in tensors])[0], strict=True):
            with torch.no_grad():
                tensor.copy_(given)


def in_threads(size: int, work: Callable[[Threads], Result]) -> list[Result]:
    """What `work` gives each of so many threads, in their order; the first error of any is raised."""
    table, barrier = [None] * size, threading.Barrier(size)

    def one(rank: int) -> Result:
        try:
            return work(Threads(rank, table, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
