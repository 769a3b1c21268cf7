"""What flows through reinforcement learning.

Shapes: B rows (prompts times group_size, prompt-major), P prompt tokens (padded left), R response tokens (padded
right), N rows of a micro-batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from components.artifacts import Metrics
from components.batches import unit_batches

State = Callable[[], dict[str, Tensor]]
"""Gives the tensors of a state, by name, when a checkpoint is written: whatever has happened since it was taken."""
Means = dict[str, tuple[float, float]]
"""What is worth logging, by name: a sum and how many it is a sum over, so that micro-batches add up exactly."""


@dataclass(frozen=True)
class Rollout:
    """Fresh responses and all that the models said of them; nothing here carries a gradient."""

    input_ids: Tensor
    """(B, P+R)"""
    attention_mask: Tensor
    """(B, P+R), true on prompt and response tokens."""
    mask: Tensor
    """(B, R), true on response tokens, end-of-sequence included."""
    logprobs: Tensor
    """(B, R) under the policy before the updates, as the trainer computes them."""
    ref_logprobs: Tensor
    """(B, R) under the reference policy."""
    scores: Tensor
    """(B,) of the reward scorer."""
    ended: Tensor
    """(B,), true where the policy ended its response."""
    costs: Tensor | None = None
    """(B,) of the cost scorer; above 0 is unsafe."""
    values: Tensor | None = None
    """(B, R) of the reward critic."""
    cost_values: Tensor | None = None
    """(B, R) of the cost critic."""
    group_size: int = 1
    weights: Tensor | None = None
    """Importance weights (B, R) or (B,) of what another policy than the trainer's sampled; see importance.py."""


@dataclass(frozen=True)
class Batch:
    """What the updates need of a rollout, or of labelled pairs; rows of one `unit` stay together."""

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    logprobs: Tensor | None = None
    """(B, R) of the policy before the updates, where more than one is to be compared with it."""
    ref_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    """(B, R) or, where an algorithm weighs whole responses, (B,)."""
    returns: Tensor | None = None
    values: Tensor | None = None
    cost_returns: Tensor | None = None
    cost_values: Tensor | None = None
    weights: Tensor | None = None
    """Importance weights of the policy's objective, (B, R) or (B,) as the algorithm's ratio; absent weighs nothing."""
    unit: int = 1
    """Consecutive rows that a minibatch must not part."""
    group: int = 1
    """Consecutive rows with one prompt, which minibatches that hold whole groups do not part either."""
    metrics: Metrics = field(default_factory=dict)
    scatter: list[tuple[float, float]] = field(default_factory=list)
    """Reward and cost of each response of the rollout, where there are costs."""

    @classmethod
    def of(cls, rollout: Rollout, **targets: Any) -> Self:
        """The rollout's rows with what they teach."""
        given = rollout.input_ids, rollout.attention_mask, rollout.mask, rollout.logprobs
        return cls(*given, weights=rollout.weights, **targets)

    def __len__(self) -> int:
        return len(self.input_ids)

    def old_logprobs(self, forward: "Forward") -> Tensor:
        """(B, R) of the policy before the updates; before the only one, those of its own forward pass."""
        return forward.logprobs.detach() if self.logprobs is None else self.logprobs

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name."""
        return {item.name: value for item in fields(self) if isinstance(value := getattr(self, item.name), Tensor)}

    def rows(self, index: Tensor) -> Self:
        """The batch of these rows."""
        taken: dict[str, Any] = {name: value[index] for name, value in self.tensors().items()}
        return replace(self, **taken)

    def plan(self, epochs: int, size: int, seed: int) -> list[Tensor]:
        """The rows of every update: for each pass every row once, in random order of whole units, `size` at a time.

        Where `size` is a multiple of the group, groups stay whole: their rows share the prompt's forward pass, and
        advantages that are relative to the group add up to nothing over every update, as they do over the batch. It
        depends on the arguments and the number of rows alone. The last minibatch of a pass may be smaller.
        """
        generator = torch.Generator().manual_seed(seed)
        unit = self.unit if size % self.group else max(self.unit, self.group)
        step = max(unit, size // unit * unit)
        plan: list[Tensor] = []
        for _ in range(epochs):
            units = torch.randperm(len(self) // unit, generator=generator)
            plan += (units[:, None] * unit + torch.arange(unit)).flatten().split(step)
        return [rows for rows in plan if len(rows)]

    def micro_batches(self, size: int) -> Iterator[Self]:
        """All rows, as `micro_rows` cuts them; units stay whole."""
        for rows in micro_rows(self.attention_mask, size, max(self.unit, self.group if self.group <= size else 1)):
            yield self.rows(rows)


def micro_rows(attention_mask: Tensor, size: int, unit: int) -> list[Tensor]:
    """The rows of each micro-batch: rows of like length together, whole units, the shortest first.

    A micro-batch is as many rows as take no more tokens, padding included, than `size` rows as long as the mask
    (B, P+R) is wide.
    """
    lengths = attention_mask.sum(1).tolist()
    return [torch.tensor(rows) for rows in unit_batches(lengths, unit, size * attention_mask.shape[1])]


class Forward(NamedTuple):
    """What the models under training say of a micro-batch; ZeRO finds the tensors in a tuple, and in no dataclass."""

    logprobs: Tensor
    """(N, R)"""
    entropy: Tensor
    """(N, R)"""
    values: Tensor | None = None
    """(N, R)"""
    cost_values: Tensor | None = None
    """(N, R)"""


class Learner(Protocol):
    """How far the weights are from what a batch teaches; all that the loop knows of an algorithm."""

    def terms(self, batch: Batch) -> float:
        """What the summed loss of these rows is divided by (tokens, sequences or pairs)."""
        ...

    def loss(self, batch: Batch, forward: Forward) -> tuple[Tensor, Means]:
        """The loss summed over terms, and what is worth logging."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, as JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        ...


class Algorithm(Learner, Protocol):
    """A learner from rollouts: it also says what a rollout teaches."""

    group_size: int
    """Responses sampled per prompt."""
    rows_per_prompt: int
    """Rows per prompt that a batch has at most."""
    ratio: Literal["token", "sequence"] | None
    """What its policy-gradient ratio is taken of, and so its importance weights; none without a policy gradient."""

    def targets(self, rollout: Rollout) -> Batch:
        """What the rollout teaches; no gradient; may drop rows."""
        ...


class Source(Protocol):
    """Where batches come from: rollouts through the algorithm, or labelled pairs."""

    rows_per_batch: int
    """Rows that a batch has at most."""

    def batch(self, number: int) -> Batch:
        """Batch `number` (0-based), from the policy as it is now."""
        ...

    def state(self) -> State:
        """Everything that later batches depend on, besides their numbers and the weights, as it is now."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        ...

    def close(self) -> None:
        """End what works for it elsewhere."""
        ...
