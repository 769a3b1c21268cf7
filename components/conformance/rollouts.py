"""Rollouts and batches made of given numbers, without prompts: what an algorithm needs to be asked for its result."""

from typing import Any

import torch
from torch import Tensor

from components.rl.types import Batch, Forward, Learner, Rollout


def alone(tensor: Tensor) -> Tensor:
    """The sum over the processes of a run with one process."""
    return tensor


def present(tensor: Tensor | None) -> Tensor:
    """The tensor, which is there."""
    assert tensor is not None
    return tensor


def in_turn(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Rows (2N, R): chosen, rejected, chosen, ..."""
    return torch.stack([chosen, rejected], dim=1).flatten(0, 1)


def bare_rollout(mask: Tensor, scores: Tensor, **given: Any) -> Rollout:
    """A rollout of responses (B, R) that all ended; log-probabilities are 0 where none are given."""
    still = torch.zeros(mask.shape, dtype=scores.dtype)
    ended = torch.ones_like(mask[:, 0])
    fields = {"input_ids": mask.long(), "logprobs": still, "ref_logprobs": still, **given}
    return Rollout(attention_mask=mask, mask=mask, scores=scores, ended=ended, **fields)


def mean_loss(learner: Learner, mask: Tensor, targets: dict[str, Any], logprobs: Tensor, **values: Tensor) -> Tensor:
    """The loss of an algorithm on these targets, divided by its terms as the loop does."""
    batch = Batch(mask.long(), mask, mask, **targets)
    total, _ = learner.loss(batch, Forward(logprobs, torch.zeros_like(logprobs), **values))
    return total / learner.terms(batch)
