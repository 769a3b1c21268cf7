"""Estimates of the divergence between two policies from tokens that one of them sampled."""

from typing import Literal

from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped here before the exponential (OpenRLHF)."""


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-token estimates of KL(policy || reference), of the shape of the log-probabilities.

    With d = log ref - log policy: k1 = -d is unbiased, k2 = d^2 / 2 has the right gradient as a loss,
    k3 = e^d - d - 1 is never negative and of low variance (Schulman 2020, "Approximating KL divergence").
    """
    difference = (ref_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    return difference.exp() - difference - 1
