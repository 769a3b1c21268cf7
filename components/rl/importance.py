"""What another policy than the trainer's sampled: how far the two are apart, and the weights that make up for it.

A sampler of its own computes other log-probabilities than the trainer for the same tokens: other kernels, another
dtype, or weights that are older. The expectation under the trainer's policy is that under the sampler's weighted by
their ratio, which truncation keeps from being ruled by a few terms (Yao et al. 2025, "Your efficient RL framework
secretly brings you off-policy RL training"; truncated importance sampling, Ionides 2008).

Shapes: B rows, R response tokens; `mask` (B, R) is true on response tokens.
"""

from typing import Literal

from torch import Tensor

from components.artifacts import Metrics
from components.divergence import LOG_RATIO_LIMIT
from components.rl.functional import masked_mean, sequence_sums


def importance_weights(
    logprobs: Tensor, sampled: Tensor, mask: Tensor, ratio: Literal["token", "sequence"], cap: float
) -> Tensor:
    """min(trainer / sampler, `cap`), from the log-probabilities (B, R) of both; 0 outside the mask.

    Of each token (B, R), or of whole responses (B,): whichever the algorithm's own ratio is of, since the two make
    one ratio of new policy to sampler. Token ratios are biased for what follows a token but do not explode with
    length; an algorithm that takes whole responses pays that price already.
    """
    gap = (logprobs - sampled).masked_fill(~mask, 0.0)
    if ratio == "sequence":
        return sequence_sums(gap, mask).clamp(max=LOG_RATIO_LIMIT).exp().clamp(max=cap)
    return gap.clamp(max=LOG_RATIO_LIMIT).exp().clamp(max=cap).masked_fill(~mask, 0.0)


def gap_metrics(logprobs: Tensor, sampled: Tensor, mask: Tensor) -> Metrics:
    """The mean and the largest difference of the two log-probabilities (B, R), in nats per token."""
    gap = (logprobs - sampled).abs()
    return {
        "sampler/logprob_gap": float(masked_mean(gap, mask)),
        "sampler/logprob_gap_max": float(gap.masked_fill(~mask, 0.0).max()),
    }


def weight_metrics(weights: Tensor, mask: Tensor, cap: float) -> Metrics:
    """The mean of the weights, the share that was cut to `cap`, and the effective sample size as a share.

    The last is (sum w)^2 / (n sum w^2) (Kong 1992): 1 where all weigh the same.
    """
    taken = (weights[mask] if weights.dim() == mask.dim() else weights).double()
    return {
        "sampler/weight": float(taken.mean()),
        "sampler/weights_cut": float((taken >= cap).double().mean()),
        "sampler/effective": float(taken.sum().square() / (len(taken) * taken.square().sum())),
    }
