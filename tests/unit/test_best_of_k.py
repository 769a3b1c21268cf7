"""Best-of-K: which response is kept, the loss and its normalisations by hand, and that it learns."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from components.rl.algorithm_settings import BestOfKSettings
from components.rl.algorithms import build
from components.rl.algorithms.best_of_k import BestOfK
from components.rl.types import Batch, Forward, Rollout


def rollout(scores: list[float], group_size: int, **fields: Any) -> Rollout:
    """Responses of three tokens; every number of a row names the row."""
    rows = len(scores)
    numbers = torch.arange(rows)
    defaults: dict[str, Any] = {
        "input_ids": numbers[:, None].expand(rows, 5),
        "attention_mask": torch.ones(rows, 5, dtype=torch.bool),
        "mask": torch.ones(rows, 3, dtype=torch.bool),
        "logprobs": -1.0 * numbers[:, None].expand(rows, 3),
        "ref_logprobs": torch.zeros(rows, 3),
        "scores": torch.tensor(scores),
        "ended": torch.ones(rows, dtype=torch.bool),
        "group_size": group_size,
    }
    return Rollout(**(defaults | fields))


def best_of_k(group_size: int = 2, **fields: Any) -> BestOfK:
    return BestOfK(BestOfKSettings(**({"group_size": group_size, "missing_eos": "none"} | fields)), 16)


def kept(batch: Batch) -> list[int]:
    """Which rows of the rollout are learned from."""
    return batch.input_ids[:, -1].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("scores", "group_size", "expected"),
    [
        ([1.0, 2.0, 5.0, 3.0], 2, [1, 2]),
        ([1.0, 3.0, 2.0, 7.0, 8.0, 9.0], 3, [1, 5]),
        ([4.0, 2.0, 7.0, 1.0, 3.0, 6.0, 0.5, 5.0], 8, [2]),
        ([1.0, 5.0, 5.0, 1.0, 3.0, 3.0, 3.0, 3.0], 4, [1, 4]),  # of equals the first
    ],
)
def test_the_best_response_to_every_prompt_is_kept(
    scores: list[float], group_size: int, expected: list[int]
) -> None:
    batch = best_of_k(group_size).targets(rollout(scores, group_size))
    assert kept(batch) == expected
    assert batch.logprobs is not None and batch.logprobs[:, 0].tolist() == [-row for row in expected]
    assert batch.metrics["rollout/best_score"] == pytest.approx(sum(scores[row] for row in expected) / len(expected))
    assert batch.unit == 1


@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_prompts_whose_responses_score_the_same_are_counted(group_size: int) -> None:
    scores = [7.0] * group_size + [float(number) for number in range(group_size)] + [0.1] * 2 * group_size
    batch = best_of_k(group_size).targets(rollout(scores, group_size))
    assert batch.metrics["policy/flat_groups"] == 0.75
    assert kept(batch) == [0, 2 * group_size - 1, 2 * group_size, 3 * group_size]


@pytest.mark.parametrize(("rule", "expected"), [("none", [1]), ("penalty", [0]), ("replace", [0])])
def test_a_response_that_did_not_end_is_scored_by_the_rule(rule: str, expected: list[int]) -> None:
    given = rollout([1.0, 1.5], 2, ended=torch.tensor([True, False]))
    batch = best_of_k(missing_eos=rule, missing_eos_penalty=1.0).targets(given)
    assert kept(batch) == expected


def test_scores_are_clamped_after_the_rule_and_logged_as_they_were() -> None:
    given = rollout([12.0, 15.0, -15.0, -12.0, 9.0, 15.0], 2)
    batch = best_of_k(score_clip=10.0).targets(given)
    assert kept(batch) == [0, 2, 5] and batch.metrics["policy/flat_groups"] == pytest.approx(2 / 3)
    assert batch.metrics["rollout/best_score"] == pytest.approx((12 - 15 + 15) / 3)
    cut = rollout([9.9, 10.5], 2, ended=torch.tensor([True, False]))  # 10.5 - 0.5 is above 9.9, 10 - 0.5 is not
    assert kept(best_of_k(score_clip=10.0, missing_eos="penalty", missing_eos_penalty=0.5).targets(cut)) == [1]


def test_the_other_prompts_never_matter(random_rollout: Any) -> None:
    given = random_rollout(3, 4)
    owners = -100.0 * torch.arange(3).repeat_interleave(4)  # scores that tell whose they are
    marked = Rollout(**(vars(given) | {"scores": given.scores + owners}))
    batch = best_of_k(4, score_clip=1000.0).targets(marked)
    best = given.scores.view(3, 4).argmax(1) + torch.arange(3) * 4
    assert torch.equal(batch.input_ids, given.input_ids[best])


@pytest.mark.parametrize(
    ("normalization", "loss", "terms"),
    # tokens -1, -3 | -0.5: 4.5 nats on 3 tokens; means 2 and 0.5 of 2 responses
    [("token", 4.5, 3), ("sequence", 2.5, 2), ("constant", 4.5, 2 * 16)],
)
def test_the_loss_by_hand(normalization: str, loss: float, terms: int) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    batch = Batch(torch.zeros(2, 5).long(), torch.ones(2, 5).bool(), mask, torch.zeros(2, 3))
    logprobs = torch.tensor([[-1.0, -3.0, 50.0], [-0.5, 50.0, 50.0]], requires_grad=True)
    algorithm = best_of_k(normalization=normalization)
    total, means = algorithm.loss(batch, Forward(logprobs, torch.full((2, 3), 2.0)))
    assert total.item() == pytest.approx(loss)
    assert means["loss/policy"] == pytest.approx((loss, terms))
    assert means["policy/entropy"] == (6, 3)
    assert algorithm.terms(batch) == terms
    total.backward()
    share = {"sequence": [[0.5, 0.5, 0], [1, 0, 0]]}.get(normalization, [[1, 1, 0], [1, 0, 0]])
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -torch.tensor(share, dtype=torch.float32))


def test_the_constant_may_be_stated() -> None:
    batch = best_of_k().targets(rollout([1.0, 2.0, 1.0, 2.0], 2))
    assert best_of_k(normalization="constant", normalization_constant=1).terms(batch) == 2


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
def test_micro_batches_change_no_gradient_and_no_mean(
    normalization: str, random_rollout: Any, update_gradient: Any
) -> None:
    algorithm = best_of_k(3, normalization=normalization)
    batch = algorithm.targets(random_rollout(5, 3))
    assert len(batch) == 5
    (whole, means), (cut, cut_means) = (update_gradient(algorithm, batch, size) for size in (100, 1))
    torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-5)
    assert cut_means == pytest.approx(means, rel=1e-5)
    assert whole[0].abs().sum() > 0 and whole[1:].abs().sum() == 0


def test_the_expected_score_never_falls_with_k_and_the_pull_is_bounded() -> None:
    # Exactly, on four words with distinct scores: P(best of k is w) = F(w)^k - F(w-)^k (Beirami et al. 2024)
    probabilities, scores = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.0, 1.0, 2.0, 5.0])
    upto = probabilities.cumsum(0)
    generator, means = torch.Generator().manual_seed(0), []
    for k in (2, 3, 8):
        words = torch.multinomial(probabilities, 6000 * k, replacement=True, generator=generator)
        given = rollout(scores[words].tolist(), k, input_ids=words[:, None].expand(-1, 5))
        found = best_of_k(k).targets(given).input_ids[:, 0].bincount(minlength=4) / 6000
        exact = upto**k - (upto - probabilities) ** k
        torch.testing.assert_close(found.double(), exact, atol=0.03, rtol=0)
        divergence = (exact * (exact / probabilities).log()).sum().item()
        assert divergence <= math.log(k) - (k - 1) / k
        means.append((found * scores).sum().item())
    assert (probabilities * scores).sum() < means[0] < means[1] < means[2]


def test_best_of_k_is_what_its_settings_name_and_keeps_no_state() -> None:
    def alone(tensor: Tensor) -> Tensor:
        return tensor

    algorithm = build(BestOfKSettings(group_size=5), alone, 20)
    assert type(algorithm) is BestOfK and (algorithm.group_size, algorithm.rows_per_prompt) == (5, 1)
    assert algorithm.constant == 20 and algorithm.state_dict() == {}


def test_best_of_k_learns_to_say_the_word_that_scores(bandit: Any, word_scorer: Any) -> None:
    learned = bandit.learn(bandit.settings(BestOfKSettings()), word_scorer({"a": 1.0}))
    assert learned["p/a"] > 0.7
    assert learned["policy/first_ratio_gap"] < 1e-5


def test_a_sign_error_breaks_it(bandit: Any, word_scorer: Any) -> None:
    learned = bandit.learn(bandit.settings(BestOfKSettings()), word_scorer({"a": 1.0}, sign=-1.0))
    assert learned["p/a"] < 0.05
