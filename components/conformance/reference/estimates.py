"""Means, divergences, rewards and advantages, token by token in plain Python.

Written from the formulas, in float64, without tensors: what the golden vectors expect. Shapes: B rows, R response
tokens; `mask` is true on response tokens, and nothing outside it is read.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from components.conformance.reference.complex_step import clamp, exp

Rows = Sequence[Sequence[float]]
Mask = Sequence[Sequence[bool]]

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped here before the exponential."""
WHITENING_EPSILON = 1e-8
"""Added to the variance."""


def response(row: Sequence[complex], mask: Sequence[bool]) -> list[complex]:
    """The values on response tokens."""
    return [value for value, inside in zip(row, mask, strict=True) if inside]


def padded(values: Sequence[float], width: int) -> list[float]:
    """The values, then zeros."""
    return [*values, *[0.0] * (width - len(values))]


def masked_mean(values: Rows, mask: Mask) -> float:
    """The mean over all response tokens of the batch."""
    inside = [value.real for row, places in zip(values, mask, strict=True) for value in response(row, places)]
    return sum(inside) / len(inside)


def whiten(values: Rows, mask: Mask, shift_mean: bool) -> list[list[float]]:
    """(x - mean) / sqrt(variance + 1e-8), the mean added again unless it is shifted; variance over n, not n - 1."""
    inside = [value.real for row, places in zip(values, mask, strict=True) for value in response(row, places)]
    mean = sum(inside) / len(inside)
    variance = sum((value - mean) ** 2 for value in inside) / len(inside)
    kept = 0.0 if shift_mean else mean
    return [
        padded(
            [(value.real - mean) / math.sqrt(variance + WHITENING_EPSILON) + kept for value in response(row, places)],
            len(row),
        )
        for row, places in zip(values, mask, strict=True)
    ]


def kl_token(logprob: complex, ref_logprob: complex, estimator: str) -> complex:
    """One token's estimate of KL(policy || reference), with r = pi_ref / pi: -log r, (log r)^2 / 2, r - 1 - log r."""
    log_ratio = clamp(ref_logprob - logprob, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    estimates = {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": exp(log_ratio) - 1 - log_ratio}
    return estimates[estimator]


def kl_estimate(logprobs: Rows, ref_logprobs: Rows, estimator: str) -> list[list[float]]:
    """The estimates of all tokens."""
    return [
        [kl_token(value, ref, estimator).real for value, ref in zip(row, refs, strict=True)]
        for row, refs in zip(logprobs, ref_logprobs, strict=True)
    ]


def token_rewards(scores: Sequence[float], penalty: Rows, mask: Mask) -> list[list[float]]:
    """Minus the penalty on every token, plus the score on the last."""
    rewards = []
    for score, row, places in zip(scores, penalty, mask, strict=True):
        inside = [-value.real for value in response(row, places)]
        inside[-1] += score
        rewards.append(padded(inside, len(row)))
    return rewards


def eos_rule(scores: Sequence[float], ended: Sequence[bool], rule: str, penalty: float) -> list[float]:
    """Scores of responses that were cut off: minus the penalty, replaced by its negative, or as they are."""
    return [
        score if end or rule == "none" else score - penalty if rule == "penalty" else -penalty
        for score, end in zip(scores, ended, strict=True)
    ]


def gae(
    rewards: Rows, values: Rows, mask: Mask, gamma: float, lam: float
) -> tuple[list[list[float]], list[list[float]]]:
    """Advantages as the whole sum over later deltas, and returns; the value after the last token is 0."""
    advantages, returns = [], []
    for reward_row, value_row, places in zip(rewards, values, mask, strict=True):
        reward = [number.real for number in response(reward_row, places)]
        value = [number.real for number in response(value_row, places)]
        deltas = [r + gamma * after - v for r, (v, after) in zip(reward, pairwise([*value, 0.0]), strict=True)]
        advantage = [
            sum((gamma * lam) ** distance * delta for distance, delta in enumerate(deltas[t:]))
            for t in range(len(deltas))
        ]
        advantages.append(padded(advantage, len(places)))
        returns.append(padded([a + v for a, v in zip(advantage, value, strict=True)], len(places)))
    return advantages, returns


def groups(values: Sequence[float], group_size: int) -> Iterator[Sequence[float]]:
    """Consecutive rows of one prompt."""
    for start in range(0, len(values), group_size):
        yield values[start : start + group_size]


def leave_one_out(rewards: Sequence[float], group_size: int) -> list[float]:
    """Each reward minus the mean of the others of its group."""
    return [
        reward - sum([*group[:at], *group[at + 1 :]]) / (group_size - 1)
        for group in groups(rewards, group_size)
        for at, reward in enumerate(group)
    ]


def deviation(values: Sequence[float]) -> float:
    """The sample's standard deviation, over n - 1."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def rloo_advantages(
    scores: Sequence[float], logprobs: Rows, ref_logprobs: Rows, mask: Mask, group_size: int, kl_coef: float
) -> list[float]:
    """Leave-one-out advantages of the scores minus kl_coef times the k1 estimate summed over the response."""
    rewards = []
    for score, row, refs, places in zip(scores, logprobs, ref_logprobs, mask, strict=True):
        tokens = zip(response(row, places), response(refs, places), strict=True)
        rewards.append(score - kl_coef * sum(kl_token(value, ref, "k1").real for value, ref in tokens))
    return leave_one_out(rewards, group_size)


def group_advantages(rewards: Sequence[float], group_size: int, scale: str, eps: float) -> list[float]:
    """Each reward minus its group's mean, over the deviation of the group, of the batch, or over nothing."""
    advantages = []
    for group in groups(rewards, group_size):
        mean = sum(group) / group_size
        divisor = {"group": deviation(group) + eps, "batch": deviation(rewards) + eps, "none": 1.0}[scale]
        equal = all(reward == group[0] for reward in group)
        advantages += [0.0 if equal else (reward - mean) / divisor for reward in group]
    return advantages


def ppo_lag_advantages(
    scores: Sequence[float],
    costs: Sequence[float],
    logprobs: Rows,
    ref_logprobs: Rows,
    values: Rows,
    cost_values: Rows,
    mask: Mask,
    kl_coef: float,
    gamma: float,
    lam: float,
    log_lambda: float,
) -> list[list[float]]:
    """(A_r - lambda A_c) / (1 + lambda), with -kl_coef * k1 in the reward stream and +kl_coef * k1 in the costs."""
    multiplier = math.exp(log_lambda)
    penalty = [
        [kl_coef * number if inside else 0.0 for number, inside in zip(row, places, strict=True)]
        for row, places in zip(kl_estimate(logprobs, ref_logprobs, "k1"), mask, strict=True)
    ]
    rewards = token_rewards(scores, penalty, mask)
    surcharge = token_rewards(costs, [[-number for number in row] for row in penalty], mask)
    gains, _ = gae(rewards, values, mask, gamma, lam)
    losses, _ = gae(surcharge, cost_values, mask, gamma, lam)
    return [
        [(gain - multiplier * loss) / (1 + multiplier) for gain, loss in zip(row, other, strict=True)]
        for row, other in zip(gains, losses, strict=True)
    ]


def log_lambda_step(log_lambda: float, lr: float, cost: float, limit: float, lambda_max: float) -> float:
    """One step up the gradient of lambda (J_C - d) by log lambda, then the upper bound."""
    return min(log_lambda + lr * math.exp(log_lambda) * (cost - limit), math.log(lambda_max))


def learning_rate(updates: Sequence[int], total: int, warmup: float, schedule: str, min_lr: float) -> list[float]:
    """Shares of the peak rate: a line up to 1 over the warm-up, then down to `min_lr`, or constant."""
    rising = math.ceil(warmup * total)
    factors = []
    for update in updates:
        done = (update - rising) / max(1, total - rising)
        falling = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[schedule]
        floor = 0.0 if schedule == "constant" else min_lr
        factors.append((update + 1) / rising if update < rising else floor + (1 - floor) * falling)
    return factors


def best_of_n(probabilities: Sequence[float], scores: Sequence[float], n: int) -> tuple[float, float]:
    """The expected best score of n samples, and KL(best-of-n || one sample) in nats.

    P(best <= s) = P(score <= s)^n; outcomes of the same score share its mass in proportion to their probability.
    """
    expected = divergence = below = 0.0
    for score in sorted(set(scores)):
        mass = sum(p for p, other in zip(probabilities, scores, strict=True) if other == score)
        best = (below + mass) ** n - below**n
        expected += best * score
        divergence += best * math.log(best / mass)
        below += mass
    return expected, divergence
