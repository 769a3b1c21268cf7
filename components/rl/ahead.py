"""Drafts made ahead by a process of its own, while the batches before are learned from.

Draft n is made with the weights as they were after max(0, n - staleness) batches, whenever it is made: a run can be
repeated, and one that was stopped goes on with the same numbers. The queue is the drafts that are finished or under
way; a checkpoint holds all that need weights which the policy no longer has, and waits for those under way.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from components.artifacts import Metrics
from components.generation.making import Made, Maker
from components.generation.overlap import Overlap
from components.generation.versions import Versions
from components.models import device
from components.phases import Phases
from components.randomness import random_states, set_random_states
from components.rl.drafts import SAMPLER_STATE, Draft, Drafting
from components.rl.types import State
from components.settings import OverlapSettings

QUEUE, METRICS = "queue.", "metrics."
"""Before the names of a queued draft's tensors in a checkpoint, its number between; before those of its metrics."""
NEXT, AFTER = "queue.next", "sampler."
"""The draft that is asked for next; before the names of the sampler's state after the last one that is there."""
TENSORS = [item.name for item in fields(Draft) if item.name not in ("group_size", "metrics")]


class Ahead:
    """Drafts from another process, which is at most `staleness` batches of learning behind."""

    def __init__(
        self,
        settings: OverlapSettings,
        policy: nn.Module,
        build: Callable[[], Maker],
        group_size: int,
        total: int,
        on_policy: bool,
        phases: Phases,
    ) -> None:
        """`total` drafts at most; `on_policy` as the sampler in the process. The process has `policy`'s shapes."""
        self.settings, self.policy, self.group_size, self.total = settings, policy, group_size, total
        self.on_policy = on_policy and settings.staleness == 0
        self.versions = Versions(trained(policy), settings.staleness + 1)
        self.process = Overlap(build, self.versions, settings)
        self.phases = phases
        self._next = self._asked = 0

    def draft(self, number: int) -> Draft:
        """The draft of rollout `number` (0-based), once those that the present weights are for are asked for."""
        self._next = number
        self._ask_ahead()
        with self.phases.phase("waited"):
            made = self.process.wait(number)
        self._next = number + 1
        self.process.forget(number - 1)  # the state after the last one is what the next depends on
        return _draft(made, self.group_size, {"sampler/staleness": float(number - self._version(number))})

    def state(self) -> State:
        """The drafts that were made and not yet asked for, and the random state after the last of them."""
        first = self._next
        return lambda: self._queue(first)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self._next = self._asked = int(tensors[NEXT])
        state = _below(AFTER, tensors)
        while found := _below(f"{QUEUE}{self._asked}.", tensors):
            metrics = {name: float(value) for name, value in _below(METRICS, found).items()}
            kept = {name: value for name, value in found.items() if name in TENSORS}
            self.process.made[self._asked] = Made(kept, metrics, state)
            self._asked += 1
        self.process.start_state = state

    def close(self) -> None:
        """End the process."""
        self.process.close()

    def _version(self, number: int) -> int:
        """The batches that have been learned from in the weights that a draft is made with."""
        return max(0, number - self.settings.staleness)

    def _ask_ahead(self) -> None:
        """Ask for every draft that the weights as they are now are for."""
        number = self._next
        last = min(number + self.settings.staleness, self.total - 1)
        if self._asked > last:
            return
        if not self.process.start_state:
            self.process.start_state = random_states()  # a scorer that draws goes on as it would here
        self.versions.write(number, trained(self.policy))
        while self._asked <= last:
            assert self._version(self._asked) == number
            self.process.ask(self._asked, number)
            self._asked += 1

    def _queue(self, first: int) -> dict[str, Tensor]:
        """The finished drafts from `first` on, once those are finished whose weights the policy no longer has."""
        for number in range(first, self._asked):
            if self._version(number) < first:
                self.process.wait(number)
        made, end = self.process.made, first
        tensors = {NEXT: torch.tensor(first)}
        while end in made:
            numbers = {METRICS + name: torch.tensor(x, dtype=torch.float64) for name, x in made[end].metrics.items()}
            tensors |= {f"{QUEUE}{end}.{name}": value for name, value in (made[end].tensors | numbers).items()}
            end += 1
        state = made[end - 1].state if end - 1 in made else self.process.start_state
        return tensors | {AFTER + name: tensor for name, tensor in state.items()}


class DraftMaker:
    """What the process does: drafts as `Drafting` makes them, with all random states of the process kept."""

    def __init__(self, drafting: Drafting, policy: nn.Module, phases: Phases) -> None:
        """`phases` are those of `drafting`, and of nothing else in the process."""
        self.drafting, self.weights, self.phases = drafting, trained(policy), phases

    def make(self, number: int) -> tuple[dict[str, Tensor], Metrics]:
        """The tensors of draft `number`, and its metrics."""
        draft = self.drafting.draft(number)
        tensors = {name: value for name in TENSORS if (value := getattr(draft, name)) is not None}
        return tensors, draft.metrics | self.phases.lap()

    def state(self) -> dict[str, Tensor]:
        """Of the sampler, and every global one, which scorers may draw from."""
        return self.drafting.state()() | random_states()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave; where nothing has been sampled, the sampler has the state it starts with."""
        set_random_states(state)
        if SAMPLER_STATE in state:
            self.drafting.restore(state)


def trained(policy: nn.Module) -> Sequence[Tensor]:
    """The weights that updates change."""
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


def _draft(made: Made, group_size: int, metrics: Metrics) -> Draft:
    """The draft on this process's device."""
    given: dict[str, Any] = {name: made.tensors.get(name) for name in TENSORS}
    on_device: dict[str, Any] = {n: value if value is None else value.to(device()) for n, value in given.items()}
    return Draft(**on_device, group_size=group_size, metrics=made.metrics | metrics)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
