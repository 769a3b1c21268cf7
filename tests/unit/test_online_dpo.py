"""Online DPO: which responses become a pair, which prompts say nothing, and that it learns."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from components.rl.algorithm_settings import OnlineDPOSettings
from components.rl.algorithms import build
from components.rl.algorithms.online_dpo import OnlineDPO
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
        "ref_logprobs": -10.0 * numbers[:, None].expand(rows, 3),
        "scores": torch.tensor(scores),
        "ended": torch.ones(rows, dtype=torch.bool),
        "group_size": group_size,
    }
    return Rollout(**(defaults | fields))


def online_dpo(group_size: int, **fields: Any) -> OnlineDPO:
    return OnlineDPO(OnlineDPOSettings(**({"group_size": group_size, "missing_eos": "none"} | fields)))


def pairs(batch: Batch) -> list[tuple[int, int]]:
    """Which rows of the rollout became chosen and rejected."""
    assert batch.unit == 2
    rows = batch.input_ids[:, -1].tolist()
    return list(zip(rows[0::2], rows[1::2], strict=True))


@pytest.mark.parametrize(
    ("scores", "group_size", "expected"),
    [
        ([1.0, 2.0, 5.0, 3.0], 2, [(1, 0), (2, 3)]),
        ([1.0, 3.0, 2.0, 9.0, 7.0, 8.0], 3, [(1, 0), (3, 4)]),
        ([4.0, 2.0, 7.0, 1.0, 3.0, 6.0, 0.5, 5.0], 8, [(2, 6)]),
        ([1.0, 5.0, 5.0, 1.0], 4, [(1, 0)]),  # of equals the first
    ],
)
def test_the_best_and_the_worst_of_a_prompt_become_its_pair(
    scores: list[float], group_size: int, expected: list[tuple[int, int]]
) -> None:
    batch = online_dpo(group_size).targets(rollout(scores, group_size))
    assert pairs(batch) == expected
    assert batch.metrics == {"rollout/informative_pairs": 1.0}


def test_the_numbers_of_a_row_go_with_it() -> None:
    batch = online_dpo(2).targets(rollout([1.0, 2.0], 2))
    assert batch.ref_logprobs is not None and batch.logprobs is not None
    assert batch.ref_logprobs[:, 0].tolist() == [-10, 0] and batch.logprobs[:, 0].tolist() == [-1, 0]
    assert batch.advantages is None


@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_prompts_whose_responses_score_the_same_are_dropped_and_counted(group_size: int) -> None:
    scores = [7.0] * group_size + [float(number) for number in range(group_size)] + [0.1] * 2 * group_size
    batch = online_dpo(group_size).targets(rollout(scores, group_size))
    assert pairs(batch) == [(2 * group_size - 1, group_size)]
    assert batch.metrics == {"rollout/informative_pairs": 0.25}


def test_nothing_may_be_left() -> None:
    batch = online_dpo(2).targets(rollout([1.0, 1.0, 2.0, 2.0], 2))
    assert len(batch) == 0 and batch.metrics == {"rollout/informative_pairs": 0.0}
    assert batch.plan(2, 32, seed=0) == []


def test_identical_texts_are_dropped_whatever_they_scored_and_whatever_lies_behind_them() -> None:
    ids = torch.tensor([[1, 2, 7, 8, 0], [1, 2, 7, 8, 9], [1, 2, 7, 8, 5], [1, 2, 7, 3, 5]])
    mask = torch.tensor([[True, True, False], [True, True, False], [True, True, True], [True, True, True]])
    given = rollout([1.0, 2.0, 3.0, 4.0], 2, input_ids=ids, mask=mask)
    batch = online_dpo(2).targets(given)
    assert torch.equal(batch.input_ids, ids[[3, 2]])
    assert batch.metrics == {"rollout/informative_pairs": 0.5}


@pytest.mark.parametrize("last", [0, 1, 8])
def test_a_text_and_its_beginning_are_not_identical(last: int) -> None:
    ids = torch.tensor([[1, 2, 7, 8, last], [1, 2, 7, 8, last]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert len(online_dpo(2).targets(rollout([1.0, 2.0], 2, input_ids=ids, mask=mask))) == 2


def test_prompts_that_begin_alike_do_not_make_responses_alike() -> None:
    ids = torch.tensor([[1, 1, 7, 8, 9], [1, 1, 7, 8, 6]])
    assert len(online_dpo(2).targets(rollout([1.0, 2.0], 2, input_ids=ids))) == 2


@pytest.mark.parametrize(("rule", "expected"), [("none", (1, 0)), ("penalty", (0, 1)), ("replace", (0, 1))])
def test_a_response_that_did_not_end_is_scored_by_the_rule(rule: str, expected: tuple[int, int]) -> None:
    given = rollout([1.0, 1.5], 2, ended=torch.tensor([True, False]))
    assert pairs(online_dpo(2, missing_eos=rule, missing_eos_penalty=1.0).targets(given)) == [expected]


def test_scores_that_are_equal_once_clamped_say_nothing() -> None:
    given = rollout([12.0, 15.0, -12.0, -15.0, 9.0, 15.0], 2)
    batch = online_dpo(2, score_clip=10.0).targets(given)
    assert pairs(batch) == [(5, 4)]
    assert pairs(online_dpo(2, score_clip=20.0).targets(given)) == [(1, 0), (2, 3), (5, 4)]


def test_the_clamp_comes_after_the_rule() -> None:
    given = rollout([9.9, 10.5], 2, ended=torch.tensor([True, False]))  # 10.5 - 0.5 is above 9.9, 10 - 0.5 is not
    assert pairs(online_dpo(2, score_clip=10.0, missing_eos="penalty", missing_eos_penalty=0.5).targets(given)) == [
        (1, 0)
    ]


def test_the_other_prompts_never_matter(random_rollout: Any) -> None:
    given = random_rollout(3, 4)
    owners = 100.0 * torch.arange(3).repeat_interleave(4)  # scores that tell whose they are
    marked = Rollout(**(vars(given) | {"scores": given.scores + owners}))
    plain, other = (online_dpo(4, score_clip=1000.0).targets(found) for found in (given, marked))
    assert torch.equal(plain.input_ids, other.input_ids)
    chosen = given.scores.view(3, 4).argmax(1) + torch.arange(3) * 4
    assert torch.equal(plain.input_ids[0::2], given.input_ids[chosen])


def test_the_loss_is_that_of_dpo_with_its_settings() -> None:
    algorithm = online_dpo(2, beta=0.5, label_smoothing=0.2)
    batch = algorithm.targets(rollout([1.0, 2.0], 2))
    assert batch.ref_logprobs is not None
    forward = Forward(batch.ref_logprobs + torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 3))
    total, means = algorithm.loss(batch, forward)  # h = 3 + 3
    expected = 0.8 * math.log(1 + math.exp(-3)) + 0.2 * math.log(1 + math.exp(3))
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert means["policy/margin"] == pytest.approx((3, 1)) and algorithm.terms(batch) == 1


@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_change_no_gradient_and_no_mean(micro: int, random_rollout: Any, update_gradient: Any) -> None:
    algorithm = online_dpo(3)
    batch = algorithm.targets(random_rollout(5, 3))
    (whole, means), (cut, cut_means) = (update_gradient(algorithm, batch, size) for size in (100, micro))
    torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-5)
    assert cut_means == pytest.approx(means, rel=1e-5)


def test_online_dpo_is_what_its_settings_name_and_keeps_no_state() -> None:
    def alone(tensor: Tensor) -> Tensor:
        return tensor

    algorithm = build(OnlineDPOSettings(group_size=5), alone, 16)
    assert type(algorithm) is OnlineDPO and (algorithm.group_size, algorithm.rows_per_prompt) == (5, 2)
    assert algorithm.state_dict() == {}


@pytest.mark.parametrize("group_size", [2, 4])
def test_online_dpo_learns_to_say_the_word_that_scores(bandit: Any, word_scorer: Any, group_size: int) -> None:
    learned = bandit.learn(bandit.settings(OnlineDPOSettings(group_size=group_size)), word_scorer({"a": 1.0}))
    assert learned["p/a"] > 0.7
    assert learned["rollout/informative_pairs"] < 1  # both say it


def test_a_sign_error_breaks_it(bandit: Any, word_scorer: Any) -> None:
    learned = bandit.learn(bandit.settings(OnlineDPOSettings()), word_scorer({"a": 1.0}, sign=-1.0))
    assert learned["p/a"] < 0.05
