"""The loss of pre-training and fine-tuning: what is learned, and how it is measured."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components.likelihood import Likelihood, Passage, evaluate_likelihood
from components.logprobs import LanguageModel
from components.models import load_policy


class Table(nn.Module):
    """A language model whose next-token logits depend on the last token alone: losses can be looked up."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[input_ids])


def bigrams() -> LanguageModel:
    """After token 1: tokens with probabilities 0.5, 0.25, 0.125, 0.125; after any other all alike."""
    logits = torch.zeros(4, 4)
    logits[1] = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    return LanguageModel(Table(logits))


def test_cross_entropy_by_hand() -> None:
    # 1 -> 2 costs -ln 1/8, 2 -> 1 costs -ln 1/4, 1 -> 0 costs -ln 1/2: the likeliest, the only right guess
    loss = Likelihood().loss(bigrams(), [Passage([1, 2, 1, 0], 1)])
    assert loss.total.item() == pytest.approx(math.log(8) + math.log(4) + math.log(2))
    assert loss.sums == {"train/token_accuracy": 1.0}


def test_the_prompt_carries_no_loss_and_no_gradient() -> None:
    model, objective = bigrams(), Likelihood()
    row = Passage([1, 2, 3, 1, 2], 4)
    loss = objective.loss(model, [row])
    loss.total.backward()
    assert objective.terms(row) == 1
    assert loss.total.item() == pytest.approx(math.log(8))
    assert model.policy.logits.grad is not None
    assert model.policy.logits.grad.abs().sum(1).nonzero().flatten().tolist() == [
        1
    ]  # of the last prompt token alone


def test_batch_mates_and_padding_change_nothing(policy_folder: Path) -> None:
    model, objective = LanguageModel(load_policy(policy_folder)), Likelihood()
    rows = [Passage([10, 11, 12, 13, 14, 1], 3), Passage([20, 21, 1], 1), Passage([30, 0, 31, 0], 2)]
    with torch.no_grad():
        together = objective.loss(model, rows).total.item()
        alone = sum(objective.loss(model, [row]).total.item() for row in rows)
    assert together == pytest.approx(alone, rel=1e-5)


def test_a_learned_token_that_padding_looks_like_counts() -> None:
    loss = Likelihood().loss(bigrams(), [Passage([1, 0], 1), Passage([1, 2, 1], 1)])
    assert loss.total.item() == pytest.approx(math.log(2) + math.log(8) + math.log(4))


def test_evaluation_is_per_learned_token_whatever_the_batches() -> None:
    rows = [Passage([1, 2, 1, 0], 1), Passage([3, 1, 0], 2), Passage([2, 2], 1)]
    # Losses ln 8, ln 4, ln 2; ln 2; ln 4: mean over five tokens 9/5 ln 2
    for batch_tokens in (4, 1000):
        metrics = evaluate_likelihood(bigrams(), rows, batch_tokens)
        assert metrics["eval/loss"] == pytest.approx(9 / 5 * math.log(2))
        assert metrics["eval/perplexity"] == pytest.approx(2 ** (9 / 5))
        assert metrics["eval/token_accuracy"] == pytest.approx(2 / 5)


def test_an_even_guess_has_the_vocabulary_s_size_as_perplexity() -> None:
    metrics = evaluate_likelihood(LanguageModel(Table(torch.zeros(4, 4))), [Passage([1, 2, 3], 1)], 64)
    assert metrics["eval/perplexity"] == pytest.approx(4)


def test_no_rows_give_no_metrics_and_a_hopeless_model_no_overflow() -> None:
    assert evaluate_likelihood(bigrams(), [], 64) == {}
    hopeless = torch.zeros(2, 2)
    hopeless[0, 0] = 5000.0
    metrics = evaluate_likelihood(LanguageModel(Table(hopeless)), [Passage([0, 1], 1)], 64)
    assert metrics["eval/loss"] == pytest.approx(5000) and math.isfinite(metrics["eval/perplexity"])
