"""The mathematics of reinforcement learning on token sequences: pure functions of tensors.

Shapes: B rows, R response tokens. `mask` (B, R) is true on response tokens; what lies outside it never matters.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from components.divergence import LOG_RATIO_LIMIT

Total = Callable[[Tensor], Tensor]
"""Adds a tensor up over all processes."""


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """The sum of the values under the mask; NaN or infinity outside it does not spread."""
    return values.masked_fill(~mask, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over all true positions of the batch (not a mean of row means)."""
    return masked_sum(values, mask) / mask.sum()


def whiten(values: Tensor, mask: Tensor, total: Total, shift_mean: bool = True) -> Tensor:
    """Values scaled to deviation 1 over the mask of the global batch, to mean 0 too unless `shift_mean` is off.

    Zero outside the mask.
    """
    count = total(mask.sum().float())
    mean = total(masked_sum(values, mask)) / count
    variance = total(masked_sum((values - mean).square(), mask)) / count
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0.0)


def last_token(mask: Tensor) -> Tensor:
    """One-hot (B, R) at each row's last response token."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return places == (mask * places).argmax(dim=1, keepdim=True)


def token_rewards(scores: Tensor, penalty: Tensor, mask: Tensor) -> Tensor:
    """Rewards (B, R): minus the per-token penalty (B, R), plus the score (B,) at the last response token."""
    return (scores[:, None] * last_token(mask) - penalty).masked_fill(~mask, 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, both (B, R), zero outside the mask.

    The value after the last response token is 0 and nothing leaks across it (Schulman et al. 2016, equation 16).
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    following, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for place in reversed(range(rewards.shape[1])):
        delta = rewards[:, place] + gamma * next_value - values[:, place]
        following = (delta + gamma * lam * following) * mask[:, place]
        advantages[:, place], next_value = following, values[:, place]
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


class PolicyLoss(NamedTuple):
    """The clipped objective, negated and summed over tokens, and sums for the log."""

    total: Tensor
    clipped: Tensor
    """Tokens where clipping decided."""
    approx_kl: Tensor
    """Sum of the k3 estimate of KL(old || new)."""
    ratio: Tensor
    """Sum of ratios."""


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> PolicyLoss:
    """PPO's token objective: -min(ratio A, clip(ratio, 1 +- clip) A), summed (Schulman et al. 2017, equation 7)."""
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    free, bounded = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    total = -masked_sum(torch.minimum(free, bounded), mask)
    with torch.no_grad():
        clipped = ((bounded < free) & mask).sum()
        approx_kl = masked_sum(ratio - 1 - log_ratio, mask)
        return PolicyLoss(total, clipped, approx_kl, masked_sum(ratio, mask))


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Half the larger squared error of the value and of the value kept within `clip` of the old one, summed."""
    values, old_values, returns = (tensor.masked_fill(~mask, 0.0) for tensor in (values, old_values, returns))
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    return masked_sum(torch.maximum((values - returns).square(), (bounded - returns).square()), mask) / 2
