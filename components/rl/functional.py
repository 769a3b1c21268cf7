"""The mathematics of learning from token sequences: pure functions of tensors.

Shapes: B rows, R response tokens. `mask` (B, R) is true on response tokens; what lies outside it never matters.
Losses are sums: the loop divides by the terms of the whole update.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from components.divergence import LOG_RATIO_LIMIT

Total = Callable[[Tensor], Tensor]
"""Adds a tensor up over all processes."""


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """The sum of the values under the mask; NaN or infinity outside it does not spread."""
    return values.masked_fill(~mask, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over all true positions of the batch (not a mean of row means)."""
    return masked_sum(values, mask) / mask.sum()


def sequence_sums(values: Tensor, mask: Tensor) -> Tensor:
    """The sum (B,) of each row's values under the mask."""
    return values.masked_fill(~mask, 0.0).sum(1)


def loss_weights(mask: Tensor, normalization: str, importance: Tensor | None = None) -> Tensor:
    """What each token's loss weighs in a sum, (B, R), zero outside the mask.

    `token` and `constant`: 1. `sequence`: one over the response's length, so that every response weighs the same.
    `importance` weights (B, R) multiply that.
    """
    weights = mask.float()
    if normalization == "sequence":
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    return weights if importance is None else weights * importance


def loss_terms(mask: Tensor, normalization: str, constant: int) -> float:
    """What the weighted sum is divided by: response tokens, responses, or responses times `constant`."""
    rows = float(len(mask))
    return {"token": float(mask.sum()), "sequence": rows, "constant": rows * constant}[normalization]


def whiten(values: Tensor, mask: Tensor, total: Total, shift_mean: bool = True) -> Tensor:
    """Values scaled to deviation 1 over the mask of the global batch, to mean 0 too unless `shift_mean` is off.

    Zero outside the mask.
    """
    count = total(mask.sum().float())
    mean = total(masked_sum(values, mask)) / count
    variance = total(masked_sum((values - mean).square(), mask)) / count
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0.0)


def eos_rule(
    scores: Tensor, ended: Tensor, rule: Literal["penalty", "replace", "none"], penalty: float
) -> Tensor:
    """Scores (B,) with those of responses that did not end lowered by `penalty`, replaced by its negative, or kept."""
    if rule == "penalty":
        return torch.where(ended, scores, scores - penalty)
    return torch.where(ended, scores, torch.full_like(scores, -penalty)) if rule == "replace" else scores


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
    return advantages, advantages + values


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """Advantages (B,) of prompt-major rewards (B,): each minus the mean of the others of its group (RLOO)."""
    groups = rewards.view(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def group_advantages(
    rewards: Tensor, group_size: int, scale: Literal["group", "batch", "none"], eps: float, total: Total
) -> Tensor:
    """Advantages (B,) of prompt-major rewards (B,): minus the group's mean, over a deviation plus `eps` (GRPO).

    `group` divides by the group's unbiased deviation, `batch` by that of the global batch, `none` by nothing. A
    group of equal rewards has advantages of exactly 0.
    """
    groups = rewards.view(-1, group_size)
    centred = (groups - groups.mean(1, keepdim=True)) * (~flat_groups(rewards, group_size)).float()[:, None]
    if scale == "group":
        centred = centred / (groups.std(1, keepdim=True) + eps)
    elif scale == "batch":
        sums = total(torch.stack([torch.ones_like(rewards).sum(), rewards.sum()]))
        squares = total((rewards - sums[1] / sums[0]).square().sum())
        centred = centred / ((squares / (sums[0] - 1)).sqrt() + eps)
    return centred.flatten()


def flat_groups(rewards: Tensor, group_size: int) -> Tensor:
    """Which groups (B / group_size,) of prompt-major rewards (B,) have no best and no worst."""
    groups = rewards.view(-1, group_size)
    return groups.amax(1) == groups.amin(1)


class PolicyLoss(NamedTuple):
    """The clipped objective, negated and summed, and sums over tokens (or sequences) for the log."""

    total: Tensor
    clipped: Tensor
    """How many terms clipping decided."""
    approx_kl: Tensor
    """Sum of the k3 estimate of KL(old || new)."""
    ratio: Tensor
    """Sum of ratios."""


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    *,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """PPO's objective: -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), summed (Schulman et al. 2017, equation 7).

    All tensors of one shape: tokens (B, R), or whole sequences (B,) with a mask of ones. `clip_high` replaces the
    upper bound (clip-higher); `dual_clip` bounds the objective below by dual_clip A where A is negative; `weights`
    weigh the terms of the sum.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    upper = clip if clip_high is None else clip_high
    free, bounded = ratio * advantages, ratio.clamp(1 - clip, 1 + upper) * advantages
    objective = torch.minimum(free, bounded)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    total = -masked_sum(objective if weights is None else objective * weights, mask)
    with torch.no_grad():
        clipped = ((objective != free) & mask).sum()
        return PolicyLoss(total, clipped, masked_sum(ratio - 1 - log_ratio, mask), masked_sum(ratio, mask))


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float, weights: Tensor | None = None
) -> Tensor:
    """Half the larger squared error of the value and of the value kept within `clip` of the old one, summed."""
    values, old_values, returns = (tensor.masked_fill(~mask, 0.0) for tensor in (values, old_values, returns))
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    error = torch.maximum((values - returns).square(), (bounded - returns).square()) / 2
    return masked_sum(error if weights is None else error * weights, mask)


def preference_loss(
    chosen: Tensor, rejected: Tensor, beta: float, kind: Literal["sigmoid", "ipo"], label_smoothing: float = 0.0
) -> Tensor:
    """The loss (N,) of the log-ratios to the reference (N,) of chosen and rejected responses.

    With h their difference, `sigmoid` is -log s(beta h) (Rafailov et al. 2023, equation 7; with label smoothing e,
    -(1 - e) log s(beta h) - e log s(-beta h)), `ipo` is (h - 1 / (2 beta))^2 (Azar et al. 2023, equation 17).
    """
    difference = chosen - rejected
    if kind == "ipo":
        return (difference - 1 / (2 * beta)).square()
    right, wrong = F.logsigmoid(beta * difference), F.logsigmoid(-beta * difference)
    return -(1 - label_smoothing) * right - label_smoothing * wrong
