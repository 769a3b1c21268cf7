"""Ensembles: the three aggregates by hand, for rewards and for costs, and the disagreement that is logged."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from components.generation import Response
from components.records import Conversation, Message
from components.scoring import EnsembleScorer
from components.settings import EnsembleScorerSettings

PROMPTS = [(Message("user", "a"),)] * 2
RESPONSES = [Response("b", (), True)] * 2


class Fixed:
    """A member that always gives back the same scores."""

    def __init__(self, *scores: float) -> None:
        self.scores, self.metrics = torch.tensor(scores, dtype=torch.float32), dict[str, float]()

    def score(self, prompts: Sequence[Conversation], responses: Sequence[Response]) -> Tensor:
        """Scores (B,)."""
        return self.scores[: len(responses)]


def ensemble(role: Any = "reward", **fields: Any) -> EnsembleScorer:
    # First response: 1, 2, 6 with mean 3 and variance (4 + 1 + 9) / 3; second: all agree on -1.
    return EnsembleScorer([Fixed(1, -1), Fixed(2, -1), Fixed(6, -1)], EnsembleScorerSettings(**fields), role)


DEVIATION = math.sqrt(14 / 3)


@pytest.mark.parametrize(
    ("role", "fields", "expected"),
    [
        ("reward", {}, 3),
        ("cost", {"aggregate": "mean"}, 3),
        ("reward", {"aggregate": "worst"}, 1),
        ("cost", {"aggregate": "worst"}, 6),
        ("reward", {"aggregate": "bound"}, 3 - DEVIATION),
        ("cost", {"aggregate": "bound"}, 3 + DEVIATION),
        ("reward", {"aggregate": "bound", "k": 2.5}, 3 - 2.5 * DEVIATION),
        ("reward", {"aggregate": "bound", "k": 0}, 3),
    ],
)
def test_the_aggregates_by_hand(role: Any, fields: Any, expected: float) -> None:
    scores = ensemble(role, **fields).score(PROMPTS, RESPONSES)
    assert scores.tolist() == pytest.approx([expected, -1])
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("role", ["reward", "cost"])
@pytest.mark.parametrize("aggregate", ["mean", "worst", "bound"])
def test_the_disagreement_is_the_mean_deviation_whatever_the_aggregate(role: Any, aggregate: Any) -> None:
    scorer = ensemble(role, aggregate=aggregate)
    assert scorer.metrics == {}
    scorer.score(PROMPTS, RESPONSES)
    assert scorer.metrics == {f"rollout/{role}_disagreement": pytest.approx((DEVIATION + 0) / 2)}
    scorer.score(PROMPTS[1:], RESPONSES[1:])
    assert scorer.metrics == {f"rollout/{role}_disagreement": pytest.approx(DEVIATION)}  # of the last call alone


def test_no_responses_have_neither_scores_nor_disagreement() -> None:
    scorer = ensemble(aggregate="worst")
    assert scorer.score([], []).shape == (0,)
    assert scorer.metrics == {}


def test_the_order_of_members_does_not_matter() -> None:
    for aggregate in ("mean", "worst", "bound"):
        settings = EnsembleScorerSettings(aggregate=aggregate)
        members = [Fixed(1, 5), Fixed(2, -3), Fixed(6, 0.5)]
        forward, backward = (
            EnsembleScorer(order, settings, "reward").score(PROMPTS, RESPONSES) for order in (members, members[::-1])
        )
        torch.testing.assert_close(forward, backward)
