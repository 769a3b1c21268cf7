"""Losses in plain Python, from the formulas; each is a scalar whose gradient the complex step gives.

Shapes: B rows, R response tokens, N pairs; `mask` is true on response tokens, and nothing outside it is read.
"""

from collections.abc import Sequence

from components.conformance.reference.complex_step import clamp, exp, log_sigmoid, maximum, minimum
from components.conformance.reference.estimates import LOG_RATIO_LIMIT, Mask, kl_token, response

ComplexRows = Sequence[Sequence[complex]]


def clipped_objective(log_ratio: complex, advantage: float, clip: float, clip_high: float | None) -> complex:
    """min(ratio A, clip(ratio, 1 - clip, 1 + clip_high) A) (Schulman et al. 2017, equation 7)."""
    ratio = exp(clamp(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    bounded = clamp(ratio, 1 - clip, 1 + (clip if clip_high is None else clip_high))
    return minimum(ratio * advantage, bounded * advantage)


def batch_loss(rows: Sequence[Sequence[complex]], normalization: str, constant: int | None) -> complex:
    """One number of the token losses: mean over tokens, mean of the rows' means, or sums over rows * constant."""
    if normalization == "token":
        return sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    if normalization == "sequence":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    assert constant is not None
    return sum(sum(row) for row in rows) / (len(rows) * constant)


def policy_loss(
    logprobs: ComplexRows,
    old_logprobs: ComplexRows,
    advantages: ComplexRows,
    mask: Mask,
    clip: float,
    clip_high: float | None,
    dual_clip: float | None,
    normalization: str,
    constant: int | None,
) -> complex:
    """PPO's clipped loss; with `dual_clip` c no token of negative advantage loses more than -c A (Ye et al. 2020)."""
    rows = []
    for row in zip(logprobs, old_logprobs, advantages, mask, strict=True):
        *columns, places = row
        losses = []
        for new, old, advantage in zip(*(response(column, places) for column in columns), strict=True):
            objective = clipped_objective(new - old, advantage.real, clip, clip_high)
            if dual_clip is not None and advantage.real < 0:
                objective = maximum(objective, dual_clip * advantage)
            losses.append(-objective)
        rows.append(losses)
    return batch_loss(rows, normalization, constant)


def value_loss(
    values: ComplexRows, old_values: ComplexRows, returns: ComplexRows, mask: Mask, clip: float
) -> complex:
    """Half the mean over tokens of the larger of two squared errors: the value's and the clipped value's."""
    losses = []
    for new_row, old_row, return_row, places in zip(values, old_values, returns, mask, strict=True):
        for new, old, target in zip(
            response(new_row, places), response(old_row, places), response(return_row, places), strict=True
        ):
            bounded = old + clamp(new - old, -clip, clip)
            losses.append(maximum((new - target) ** 2, (bounded - target) ** 2))
    return sum(losses) / len(losses) / 2


def sequence_policy_loss(
    logprobs: ComplexRows, old_logprobs: ComplexRows, advantages: Sequence[float], mask: Mask, clip: float
) -> complex:
    """The clipped loss with the ratio of whole responses, mean over rows (Ahmadian et al. 2024, RLOO)."""
    losses = []
    for new_row, old_row, advantage, places in zip(logprobs, old_logprobs, advantages, mask, strict=True):
        log_ratio = sum(response(new_row, places)) - sum(response(old_row, places))
        losses.append(-clipped_objective(log_ratio, advantage, clip, None))
    return sum(losses) / len(losses)


def grpo_loss(
    logprobs: ComplexRows,
    old_logprobs: ComplexRows,
    ref_logprobs: ComplexRows,
    advantages: Sequence[float],
    mask: Mask,
    clip: float,
    kl_coef: float,
    normalization: str,
    constant: int | None,
) -> complex:
    """Clipped loss of tokens that share their row's advantage, plus kl_coef * k3 (Shao et al. 2024, equation 3)."""
    rows = []
    for new_row, old_row, ref_row, advantage, places in zip(
        logprobs, old_logprobs, ref_logprobs, advantages, mask, strict=True
    ):
        tokens = zip(*(response(row, places) for row in (new_row, old_row, ref_row)), strict=True)
        rows.append(
            [
                -clipped_objective(new - old, advantage, clip, None) + kl_coef * kl_token(new, ref, "k3")
                for new, old, ref in tokens
            ]
        )
    return batch_loss(rows, normalization, constant)


def preference_loss(
    chosen_logprobs: ComplexRows,
    rejected_logprobs: ComplexRows,
    ref_chosen_logprobs: ComplexRows,
    ref_rejected_logprobs: ComplexRows,
    chosen_mask: Mask,
    rejected_mask: Mask,
    beta: float,
    kind: str,
    label_smoothing: float,
) -> complex:
    """The mean over pairs of DPO's -log s(beta h) (Rafailov et al. 2023, equation 7) or IPO's (h - 1 / (2 beta))^2.

    h is the log-ratio to the reference of the chosen response minus that of the rejected one, both summed over
    tokens. Smoothing takes a share of the labels for wrong (Mitchell 2023; IPO is equation 17 of Azar et al. 2023).
    """
    losses = []
    for chosen, rejected, ref_chosen, ref_rejected, places, others in zip(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, chosen_mask, rejected_mask,
        strict=True,
    ):  # fmt: skip
        chosen_ratio = sum(response(chosen, places)) - sum(response(ref_chosen, places))
        rejected_ratio = sum(response(rejected, others)) - sum(response(ref_rejected, others))
        margin = chosen_ratio - rejected_ratio
        right, wrong = (
            (-log_sigmoid(beta * sign * margin) if kind == "sigmoid" else (sign * margin - 1 / (2 * beta)) ** 2)
            for sign in (1, -1)
        )
        losses.append((1 - label_smoothing) * right + label_smoothing * wrong)
    return sum(losses) / len(losses)


def ranking_loss(chosen: Sequence[complex], rejected: Sequence[complex]) -> complex:
    """The mean over pairs of -log s(r_chosen - r_rejected) (Bradley and Terry 1952)."""
    losses = [-log_sigmoid(better - worse) for better, worse in zip(chosen, rejected, strict=True)]
    return sum(losses) / len(losses)


def cost_loss(
    chosen: Sequence[complex],
    rejected: Sequence[complex],
    chosen_sign: Sequence[float],
    rejected_sign: Sequence[float],
) -> complex:
    """The mean over pairs of the order's and the signs' losses; the rejected response costs more.

    A sign is +1 for unsafe, -1 for safe and 0 where nobody said (Dai et al. 2023).
    """
    losses = []
    for safer, worse, safer_sign, worse_sign in zip(chosen, rejected, chosen_sign, rejected_sign, strict=True):
        loss = -log_sigmoid(worse - safer)
        for sign, cost in ((safer_sign, safer), (worse_sign, worse)):
            if sign:
                loss -= log_sigmoid(sign * cost)
        losses.append(loss)
    return sum(losses) / len(losses)
