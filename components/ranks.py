"""The processes that run one step together: what each of them works on, and what they tell one another.

All of them run the same step on the same rows with the same seed, and decide the same; what is divided is the
arithmetic. Work is handed out so that each does equally many passes through the models, because some of what happens in
a pass (ZeRO-3) needs all of them: who has nothing left repeats something that counts for nothing.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Protocol, TypeVar

from components.termination import Terminated, Watch

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")
State = TypeVar("State")

class Ranks(Protocol):
    """The processes of a step, as one of them sees it."""

    size: int
    """How many they are."""
    rank: int
    """Which this one is; 0 is the first."""

    def share(self, items: Sequence[Item]) -> list[tuple[Item, float]]:
        """This process's items, each with the weight 1, then some with the weight 0 until all have equally many."""
        ...

    def spread(self, items: Sequence[Item], work: Callable[[Item], Result]) -> list[Result]:
        """What `work` makes of every item, in order; each is one process's work. Tensors may be on the CPU."""
        ...

    def gathered(self, value: Result) -> list[Result]:
        """The value of every process, in their order; tensors may be on the CPU."""
        ...

    def first(self, work: Callable[[], Result]) -> Result:
        """What `work` gives the first process, which alone does it; tensors may be on the CPU."""
        ...

    def totals(self, sums: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """Sums and counts by name, added up over all processes."""
        ...

    def highest(self, value: float) -> float:
        """The largest of all processes' values."""
        ...

    def add_up(self, tensors: Sequence["Tensor"]) -> None:
        """Make every tensor the sum of all processes', in place."""
        ...

    def copy_first(self, tensors: Sequence["Tensor"]) -> None:
        """Make every tensor the first process's, in place."""
        ...

    def barrier(self) -> None:
        """Wait for all."""
        ...

    def asked(self, watch: Watch) -> bool:
        """Whether any process was asked to stop; then each of them is."""
        ...

    @contextmanager
    def repeatable(self, watch: Watch, state: Callable[[], State], save: Callable[[State], None]) -> Iterator[None]:
        """What SIGTERM breaks off inside is done again by the next start, from the `state` before it."""
        ...


class Alone:
    """One process."""

    size, rank = 1, 0

    def share(self, items: Sequence[Item]) -> list[tuple[Item, float]]:
        """All of them."""
        return [(item, 1.0) for item in items]

    def spread(self, items: Sequence[Item], work: Callable[[Item], Result]) -> list[Result]:
        """What `work` makes of every item."""
        return [work(item) for item in items]

    def gathered(self, value: Result) -> list[Result]:
        """The one value."""
        return [value]

    def first(self, work: Callable[[], Result]) -> Result:
        """What `work` gives."""
        return work()

    def totals(self, sums: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """The sums themselves."""
        return dict(sums)

    def highest(self, value: float) -> float:
        """The value itself."""
        return value

    def add_up(self, tensors: Sequence["Tensor"]) -> None:
        """Nothing to add."""

    def copy_first(self, tensors: Sequence["Tensor"]) -> None:
        """Nothing to copy."""

    def barrier(self) -> None:
        """Nobody to wait for."""

    def asked(self, watch: Watch) -> bool:
        """Whether this process was asked to stop."""
        return watch.requested

    @contextmanager
    def repeatable(self, watch: Watch, state: Callable[[], State], save: Callable[[State], None]) -> Iterator[None]:
        """SIGTERM breaks off what is inside at once, and `save` gets the state before it."""
        before = state()  # of everything: what is broken off may have drawn random numbers
        try:
            with watch.interruptible():
                yield
        except Terminated:
            save(before)
            raise


ALONE = Alone()


def join() -> Ranks:
    """The processes that this one was started with, as torchrun says in the environment.

    Raises InputError where a machine has fewer GPUs than processes.
    """
    return ALONE if world_size() == 1 else _group()


def is_started() -> bool:
    """Whether this process was started as one of several."""
    return "WORLD_SIZE" in os.environ


def world_size() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this one is."""
    return int(os.environ.get("RANK", 0))


def is_first() -> bool:
    """Whether this process is the first, which writes and tracks for all."""
    return rank() == 0


@cache
def _group() -> Ranks:
    """The processes once they have found one another."""
    from components.group import Group

    return Group()
