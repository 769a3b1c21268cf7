"""What held-out pairs say of a reward or cost model, and of an ensemble of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.artifacts import Metrics
from components.intervals import bootstrap, calibration_error
from components.reward.pairs import Pair, PairScores


def held_out_metrics(scores: PairScores, pairs: Sequence[Pair], kind: str) -> Metrics:
    """Share of held-out pairs in the right order with its interval, calibration error, and for costs the signs.

    A tie counts half.
    The calibration error compares s(|margin|), the probability the model states for the order it prefers, with
    the share of pairs labelled in that order. The sign accuracy counts flagged responses on their side of zero.
    """
    if not pairs:
        return {}
    margin = _margin(scores, kind)
    accuracy = bootstrap(_right(margin))
    stated, right = torch.sigmoid(margin.abs()).tolist(), (margin > 0).tolist()
    metrics = {
        "eval/accuracy": accuracy.mean,
        "eval/accuracy_low": accuracy.low,
        "eval/accuracy_high": accuracy.high,
        "eval/num_pairs": float(accuracy.n),
        "eval/margin": float(margin.mean()),
        "eval/calibration_error": calibration_error(stated, right),
    }
    signs = torch.tensor([[pair.chosen_sign, pair.rejected_sign] for pair in pairs])
    flagged = signs != 0
    if kind == "cost" and flagged.any():
        on_side = (torch.stack([scores.chosen, scores.rejected], dim=1) * signs > 0)[flagged]
        sign_accuracy = bootstrap(on_side.float().tolist())
        metrics |= {
            "eval/sign_accuracy": sign_accuracy.mean,
            "eval/sign_accuracy_low": sign_accuracy.low,
            "eval/sign_accuracy_high": sign_accuracy.high,
        }
    return metrics


def ensemble_metrics(members: Sequence[PairScores], kind: str) -> Metrics:
    """What an ensemble adds on held-out pairs, from its members' normalised scores.

    The share of pairs that the mean of the members puts in the right order (a tie counts half), and the standard
    deviation between members, averaged over all responses.
    """
    chosen, rejected = (
        torch.stack(scores) for scores in ([one.chosen for one in members], [one.rejected for one in members])
    )  # (M, N) each
    if not chosen.numel():
        return {}
    right = _right(_margin(PairScores(chosen.mean(0), rejected.mean(0)), kind))
    return {
        "eval/ensemble_accuracy": sum(right) / len(right),
        "eval/disagreement": float(torch.cat([chosen, rejected], dim=1).std(dim=0, unbiased=False).mean()),
    }


def _margin(scores: PairScores, kind: str) -> Tensor:
    """By how much (N,) each pair is in the right order."""
    return scores.chosen - scores.rejected if kind == "reward" else scores.rejected - scores.chosen


def _right(margin: Tensor) -> list[float]:
    """1 for each pair in the right order, a half for a tie, else 0."""
    rows: list[float] = ((margin > 0).float() + (margin == 0).float() / 2).tolist()
    return rows
