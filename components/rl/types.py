"""What flows through reinforcement learning.

Shapes: B rows (prompts times group_size, prompt-major), P prompt tokens (padded left), R response tokens (padded
right), N rows of a micro-batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from components.artifacts import Metrics


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
    """(B, R) under the policy that sampled, recomputed by the trainer."""
    ref_logprobs: Tensor
    """(B, R) under the reference policy."""
    scores: Tensor
    """(B,) of the reward model, normalised."""
    ended: Tensor
    """(B,), true where the policy ended its response."""
    costs: Tensor | None = None
    """(B,) of the cost model, scaled; above 0 is unsafe."""
    values: Tensor | None = None
    """(B, R) of the reward critic."""
    cost_values: Tensor | None = None
    """(B, R) of the cost critic."""
    group_size: int = 1
    policy_version: int = 0


@dataclass(frozen=True)
class Batch:
    """What the updates need of a rollout; rows of one `unit` stay together."""

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    logprobs: Tensor
    advantages: Tensor
    """(B, R), zero outside the mask."""
    returns: Tensor | None = None
    values: Tensor | None = None
    cost_returns: Tensor | None = None
    cost_values: Tensor | None = None
    unit: int = 1
    """Consecutive rows that a minibatch must not part."""
    metrics: Metrics = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, index: Tensor) -> Self:
        """The batch of these rows."""
        taken: dict[str, Any] = {
            item.name: value[index]
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **taken)

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator[Self]:
        """Every row once, in random order of whole units, `size` rows at a time (the last may be smaller)."""
        units = torch.randperm(len(self) // self.unit, generator=generator)
        order = (units[:, None] * self.unit + torch.arange(self.unit)).flatten()
        step = max(self.unit, size // self.unit * self.unit)
        for start in range(0, len(order), step):
            yield self.rows(order[start : start + step])

    def micro_batches(self, size: int) -> Iterator[Self]:
        """The rows in order, whole units, `size` rows at a time."""
        step = max(self.unit, size // self.unit * self.unit)
        for start in range(0, len(self), step):
            yield self.rows(torch.arange(start, min(start + step, len(self))))


@dataclass(frozen=True)
class Forward:
    """What the models under training say of a micro-batch."""

    logprobs: Tensor
    """(N, R)"""
    entropy: Tensor
    """(N, R)"""
    values: Tensor | None = None
    """(N, R)"""
    cost_values: Tensor | None = None
    """(N, R)"""


class Algorithm(Protocol):
    """Two functions and at most a little state: what a rollout teaches, and how far the weights are from it."""

    group_size: int
    """Responses sampled per prompt."""

    def targets(self, rollout: Rollout) -> Batch:
        """What the rollout teaches; no gradient; may drop rows."""
        ...

    def terms(self, batch: Batch) -> float:
        """What the summed loss of these rows is divided by (tokens, or sequences)."""
        ...

    def loss(self, batch: Batch, forward: Forward) -> tuple[Tensor, Metrics]:
        """The loss summed over terms, and sums of what is worth logging, per term."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, as JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        ...
