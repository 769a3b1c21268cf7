"""Our own functions under the golden vectors' names: the protocol, and the example to follow for another library.

Shapes: B rows (prompt after prompt, `group_size` rows each), R response tokens, N pairs, V outcomes. Masks are
boolean, true on response tokens. Losses are means, gradients flow to log-probabilities, values and scores.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from components import divergence
from components.conformance.rollouts import alone, bare_rollout, in_turn, mean_loss, present
from components.optimizers import learning_rate_factor
from components.reward import pairs
from components.rl import functional
from components.rl.algorithm_settings import (
    BestOfKSettings,
    GRPOSettings,
    Normalization,
    PPOLagSettings,
    PPOSettings,
    PreferenceLossSettings,
    RLOOSettings,
)
from components.rl.algorithms.best_of_k import BestOfK
from components.rl.algorithms.dpo import DPO
from components.rl.algorithms.grpo import GRPO
from components.rl.algorithms.ppo import PPO
from components.rl.algorithms.ppo_lag import PPOLag
from components.rl.algorithms.rloo import RLOO
from components.rl.controllers import LogMultiplier
from components.settings import Optimizer

DIFFERENCES: dict[str, str] = {}
"""Vectors, or functions, that give something else on purpose, and why; we have none."""


def masked_mean(*, values: Tensor, mask: Tensor) -> Tensor:
    """The mean over all response tokens."""
    return functional.masked_mean(values, mask)


def whiten(*, values: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
    """Values (B, R) scaled to deviation 1 over the mask; to mean 0 too with `shift_mean`."""
    return functional.whiten(values, mask, alone, shift_mean)


def kl_estimate(*, logprobs: Tensor, ref_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimates of KL(policy || reference) per token."""
    return divergence.kl_estimate(logprobs, ref_logprobs, estimator)


def token_rewards(*, scores: Tensor, penalty: Tensor, mask: Tensor) -> Tensor:
    """Rewards (B, R): minus the penalty (B, R), plus the score (B,) on the last token."""
    return functional.token_rewards(scores, penalty, mask)


def eos_rule(
    *, scores: Tensor, ended: Tensor, rule: Literal["penalty", "replace", "none"], penalty: float
) -> Tensor:
    """Scores (B,) after the rule for responses without an end."""
    return functional.eos_rule(scores, ended, rule, penalty)


def gae(*, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both (B, R)."""
    return functional.gae(rewards, values, mask, gamma, lam)


def leave_one_out(*, rewards: Tensor, group_size: int) -> Tensor:
    """Advantages (B,): each reward minus the mean of the others of its group."""
    return functional.leave_one_out(rewards, group_size)


def group_advantages(
    *, rewards: Tensor, group_size: int, scale: Literal["group", "batch", "none"], eps: float
) -> Tensor:
    """Advantages (B,): rewards minus their group's mean, over a deviation plus `eps`."""
    return functional.group_advantages(rewards, group_size, scale, eps, alone)


def rloo_advantages(
    *, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, group_size: int, kl_coef: float
) -> Tensor:
    """Leave-one-out advantages (B,) of scores minus `kl_coef` times the summed k1."""
    rollout = bare_rollout(mask, scores, logprobs=logprobs, ref_logprobs=ref_logprobs, group_size=group_size)
    settings = RLOOSettings(group_size=group_size, kl_coef=kl_coef, kl_estimator="k1", missing_eos="none")
    return present(RLOO(settings, alone).targets(rollout).advantages)


def ppo_lag_advantages(
    *,
    scores: Tensor,
    costs: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    cost_values: Tensor,
    mask: Tensor,
    kl_coef: float,
    gamma: float,
    lam: float,
    log_lambda: float,
) -> Tensor:
    """(A_r - lambda A_c) / (1 + lambda) (B, R), with the KL penalty in both streams."""
    settings = PPOLagSettings(
        kl_coef=kl_coef, kl_estimator="k1", gamma=gamma, lam=lam, missing_eos="none", whiten_advantages=False,
        lambda_init=math.exp(log_lambda), lambda_max=100.0, lambda_delay=1,
    )  # fmt: skip
    streams = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values, "cost_values": cost_values}
    return present(PPOLag(settings, alone, 1).targets(bare_rollout(mask, scores, costs=costs, **streams)).advantages)


def log_lambda_step(*, log_lambda: float, lr: float, cost: float, limit: float, lambda_max: float) -> float:
    """The logarithm of the multiplier after one step."""
    multiplier = LogMultiplier(
        PPOLagSettings(lambda_init=math.exp(log_lambda), lambda_lr=lr, cost_limit=limit, lambda_max=lambda_max)
    )
    multiplier.update(cost)
    return multiplier.log


def learning_rate(
    *, updates: Tensor, total: int, warmup: float, schedule: Literal["cosine", "linear", "constant"], min_lr: float
) -> Tensor:
    """Shares (U,) of the peak rate at these updates (0-based) of `total`."""
    settings = Optimizer(warmup=warmup, schedule=schedule, min_lr=min_lr)
    factors = [learning_rate_factor(update, total, settings) for update in updates.tolist()]
    return torch.tensor(factors, dtype=torch.float64)


def best_of_n(*, probabilities: Tensor, scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The expected best score of n samples, and KL(best-of-n || one sample), over all draws of n outcomes (V,)."""
    draws = torch.cartesian_prod(*[torch.arange(len(scores))] * n)  # (V^n, n)
    outcomes = draws.flatten()
    mask = torch.ones(len(outcomes), 1, dtype=torch.bool)
    rollout = bare_rollout(mask, scores[outcomes], input_ids=outcomes[:, None], group_size=n)
    kept = BestOfK(BestOfKSettings(group_size=n, missing_eos="none"), 1).targets(rollout).input_ids[:, 0]
    mass = torch.zeros_like(probabilities).index_add(0, kept, probabilities[draws].prod(1))
    return (mass * scores).sum(), (mass * (mass / probabilities).log()).sum()


def policy_loss(
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    clip_high: float | None,
    dual_clip: float | None,
    normalization: Normalization,
    constant: int | None,
) -> Tensor:
    """PPO's clipped loss of tokens (B, R)."""
    settings = PPOSettings(
        clip=clip, clip_high=clip_high, dual_clip=dual_clip,
        normalization=normalization, normalization_constant=constant,
    )  # fmt: skip
    still = torch.zeros_like(advantages)
    targets = {"logprobs": old_logprobs, "advantages": advantages, "values": still, "returns": still}
    return mean_loss(PPO(settings, alone, 1), mask, targets, logprobs, values=still)


def value_loss(*, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """PPO's clipped loss of values (B, R)."""
    still = torch.zeros_like(values)
    targets = {"logprobs": still, "advantages": still, "values": old_values, "returns": returns}
    settings = PPOSettings(value_clip=clip, value_coef=1.0)
    return mean_loss(PPO(settings, alone, 1), mask, targets, still, values=values)


def sequence_policy_loss(
    *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """RLOO's clipped loss: ratios of whole responses, advantages (B,)."""
    targets = {"logprobs": old_logprobs, "advantages": advantages}
    return mean_loss(RLOO(RLOOSettings(clip=clip), alone), mask, targets, logprobs)


def grpo_loss(
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    kl_coef: float,
    normalization: Normalization,
    constant: int | None,
) -> Tensor:
    """GRPO's loss: every token has its row's advantage (B,), plus `kl_coef` times k3."""
    settings = GRPOSettings(
        clip=clip, kl_coef=kl_coef, kl_estimator="k3", normalization=normalization, normalization_constant=constant
    )
    targets = {"logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "advantages": advantages[:, None] * mask}
    return mean_loss(GRPO(settings, alone, 1), mask, targets, logprobs)


def preference_loss(
    *,
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    beta: float,
    kind: Literal["sigmoid", "ipo"],
    label_smoothing: float,
) -> Tensor:
    """DPO's or IPO's loss of pairs of responses, (N, R) each."""
    mask = in_turn(chosen_mask, rejected_mask)
    targets = {"ref_logprobs": in_turn(ref_chosen_logprobs, ref_rejected_logprobs), "unit": 2}
    learner = DPO(PreferenceLossSettings(beta=beta, loss=kind, label_smoothing=label_smoothing))
    return mean_loss(learner, mask, targets, in_turn(chosen_logprobs, rejected_logprobs))


def ranking_loss(*, chosen: Tensor, rejected: Tensor) -> Tensor:
    """The reward model's loss of scores (N,)."""
    return pairs.ranking_loss(chosen, rejected).mean()


def cost_loss(*, chosen: Tensor, rejected: Tensor, chosen_sign: Tensor, rejected_sign: Tensor) -> Tensor:
    """The cost model's loss of costs (N,); signs: +1 unsafe, -1 safe, 0 unknown."""
    return pairs.cost_loss(chosen, rejected, chosen_sign, rejected_sign).mean()
