"""Importance weights: what another policy sampled teaches as the trainer's own would have, within the cap."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from components.rl import algorithms
from components.rl.algorithm_settings import (
    AlgorithmSettings,
    BestOfKSettings,
    GRPOSettings,
    OnlineDPOSettings,
    PPOLagSettings,
    PPOSettings,
    RLOOSettings,
)
from components.rl.functional import loss_weights
from components.rl.importance import gap_metrics, importance_weights, weight_metrics
from components.rl.types import Algorithm, Batch, Rollout

MASK = torch.tensor([[True, True, False], [True, True, True]])
LOGPROBS = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]])
SAMPLED = torch.tensor([[-1.0 - math.log(1.5), -2.0 + math.log(2.0), 0.0], [-1.0 - math.log(4.0), -1.0, -1.2]])
"""Ratios: 1.5 and 0.5; 4, 1 and e^0.2."""
GRADIENT: tuple[AlgorithmSettings, ...] = (
    PPOSettings(), PPOLagSettings(), RLOOSettings(group_size=2), GRPOSettings(group_size=2),
)  # fmt: skip


def built(settings: AlgorithmSettings) -> Algorithm:
    made = algorithms.build(settings, lambda tensor: tensor, 4)
    assert hasattr(made, "targets")
    return made


def test_token_weights_are_ratios_of_trainer_to_sampler_cut_at_the_cap() -> None:
    weights = importance_weights(LOGPROBS, SAMPLED, MASK, "token", 2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.5, 0.5, 0.0], [2.0, 1.0, math.exp(0.2)]]))


def test_sequence_weights_are_products_of_a_responses_ratios() -> None:
    weights = importance_weights(LOGPROBS, SAMPLED, MASK, "sequence", 2.0)
    torch.testing.assert_close(weights, torch.tensor([0.75, 2.0]))  # 1.5 * 0.5; 4 * 1 * e^0.2, cut
    uncut = importance_weights(LOGPROBS, SAMPLED, MASK, "sequence", 100.0)
    torch.testing.assert_close(uncut[1], torch.tensor(4 * math.exp(0.2)))


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_masked_tokens_and_equal_policies_weigh_nothing(ratio: Any) -> None:
    spoilt = SAMPLED.masked_fill(~MASK, float("nan"))
    expected = importance_weights(LOGPROBS, SAMPLED, MASK, ratio, 2.0)
    torch.testing.assert_close(importance_weights(LOGPROBS, spoilt, MASK, ratio, 2.0), expected)
    same = importance_weights(LOGPROBS, LOGPROBS, MASK, ratio, 2.0)
    assert same.eq(1.0)[MASK if ratio == "token" else slice(None)].all()


def test_a_token_that_the_sampler_thought_impossible_stays_finite() -> None:
    weights = importance_weights(LOGPROBS, LOGPROBS - 1e4, MASK, "sequence", 1e30)
    assert weights.isfinite().all()


def test_weighted_samples_have_the_mean_of_the_other_policy() -> None:
    trainer, sampler = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    value = torch.tensor([1.0, -2.0, 5.0])
    draws = torch.multinomial(sampler, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    ids = draws[:, None]
    weights = importance_weights(
        trainer.log()[ids], sampler.log()[ids], torch.ones_like(ids, dtype=torch.bool), "token", 2.0
    )
    assert float((weights[:, 0] * value[draws]).mean()) == pytest.approx(float(trainer @ value), abs=0.02)
    assert float(value[draws].mean()) == pytest.approx(float(sampler @ value), abs=0.02)  # 0.9 against 0.6


def test_gaps_are_measured_under_the_mask() -> None:
    spoilt = SAMPLED.masked_fill(~MASK, float("inf"))
    measured = gap_metrics(LOGPROBS, spoilt, MASK)
    mean = (math.log(1.5) + math.log(2) + math.log(4) + 0 + 0.2) / 5
    assert measured["sampler/logprob_gap"] == pytest.approx(mean, rel=1e-5)
    assert measured["sampler/logprob_gap_max"] == pytest.approx(math.log(4), rel=1e-5)


def test_effective_sample_size_by_hand() -> None:
    weights = importance_weights(LOGPROBS, SAMPLED, MASK, "token", 2.0)
    taken = [1.5, 0.5, 2.0, 1.0, math.exp(0.2)]
    measured = weight_metrics(weights, MASK, 2.0)
    assert measured["sampler/effective"] == pytest.approx(sum(taken) ** 2 / (5 * sum(w * w for w in taken)), rel=1e-5)
    assert measured["sampler/weight"] == pytest.approx(sum(taken) / 5, rel=1e-5)
    assert measured["sampler/weights_cut"] == pytest.approx(1 / 5)
    assert weight_metrics(torch.tensor([1.0, 1.0]), MASK, 2.0)["sampler/effective"] == 1
    assert weight_metrics(torch.tensor([2.0, 0.0]), MASK, 2.0)["sampler/effective"] == 0.5


def test_importance_multiplies_what_normalisation_gives() -> None:
    importance = torch.tensor([[1.5, 0.5, 7.0], [2.0, 1.0, 3.0]])
    torch.testing.assert_close(
        loss_weights(MASK, "sequence", importance), torch.tensor([[0.75, 0.25, 0.0], [2 / 3, 1 / 3, 1.0]])
    )
    torch.testing.assert_close(loss_weights(MASK, "token", importance), importance * MASK)


def weighted(algorithm: Algorithm, rollout: Rollout, factor: float | None) -> Batch:
    """The rollout's batch with every weight the same."""
    shape = rollout.mask.shape if algorithm.ratio == "token" else rollout.mask.shape[:1]
    return algorithm.targets(replace(rollout, weights=None if factor is None else torch.full(shape, factor)))


@pytest.mark.parametrize("settings", GRADIENT, ids=lambda s: s.name)
def test_weights_scale_the_policys_objective_alone(
    settings: AlgorithmSettings, random_rollout: Callable[..., Rollout], update_gradient: Callable[..., Any]
) -> None:
    rollout = random_rollout(4, 2)

    def learned(factor: float | None) -> tuple[Tensor, dict[str, float]]:
        algorithm = built(settings)
        found: tuple[Tensor, dict[str, float]] = update_gradient(algorithm, weighted(algorithm, rollout, factor), 4)
        return found

    (plain, means), (one, _), (half, halved) = (learned(factor) for factor in (None, 1.0, 0.5))
    assert torch.equal(plain, one) and means["loss/policy"] != 0
    assert halved["loss/policy"] == pytest.approx(means["loss/policy"] / 2, rel=1e-5)
    assert halved | {"loss/policy": 0} == means | {"loss/policy": 0}
    assert torch.equal(half[1:], plain[1:])  # of entropy and critics
    if settings.name != "grpo":  # whose KL is a term of its own
        torch.testing.assert_close(half[0], plain[0] / 2)


def test_weights_stay_with_their_rows(random_rollout: Callable[..., Rollout]) -> None:
    rollout = random_rollout(4, 2)
    weights = torch.arange(8.0)[:, None].expand(rollout.mask.shape)
    batch = built(PPOSettings()).targets(replace(rollout, weights=weights))
    assert batch.rows(torch.tensor([5, 2])).weights is not None
    assert batch.rows(torch.tensor([5, 2])).weights[:, 0].tolist() == [5, 2]  # type: ignore[index]
    assert "weights" in batch.tensors()  # and so in a checkpoint


def test_which_ratio_an_algorithm_has() -> None:
    found = [(s.name, built(s).ratio) for s in (*GRADIENT, OnlineDPOSettings(), BestOfKSettings(group_size=2))]
    assert found == [
        ("ppo", "token"), ("ppo_lag", "token"), ("rloo", "sequence"), ("grpo", "token"),
        ("online_dpo", None), ("best_of_k", None),
    ]  # fmt: skip
