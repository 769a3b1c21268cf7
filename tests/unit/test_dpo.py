"""DPO: the loss on pairs and all it logs by hand, which tokens it counts, and that it learns."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from components.rl.algorithm_settings import DPOSettings
from components.rl.algorithms import build
from components.rl.algorithms.dpo import DPO
from components.rl.types import Batch, Forward

MASK = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [True, True, True]])


def pairs(**fields: Any) -> Batch:
    """Two pairs, chosen and rejected in turn. Outside the mask are numbers that must not count."""
    defaults: dict[str, Any] = {
        "input_ids": torch.arange(20).reshape(4, 5),
        "attention_mask": torch.cat([torch.ones(4, 2, dtype=torch.bool), MASK], 1),
        "mask": MASK,
        "ref_logprobs": torch.tensor([[-1.0, -2.0, 7.0], [-1.0, 7.0, 7.0], [-1.0, -1.0, -1.0], [-2.0, -2.0, -2.0]]),
        "unit": 2,
    }
    return Batch(**(defaults | fields))


def forward_of(batch: Batch, *log_ratios: float) -> Forward:
    """Responses whose log-ratios to the reference are those given, and an entropy of 2 per token."""
    assert batch.ref_logprobs is not None
    logprobs = batch.ref_logprobs.clone()
    logprobs[:, 0] += torch.tensor(log_ratios)
    logprobs += 50.0 * ~batch.mask
    return Forward(logprobs, torch.full_like(logprobs, 2.0))


def dpo(**fields: Any) -> DPO:
    return DPO(DPOSettings(**({"beta": 0.5} | fields)))


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # log-ratios 2 and -1 of the first pair, -1 and 0.5 of the second: h = 3 and -1.5
        ({}, softplus(-1.5) + softplus(0.75)),
        ({"beta": 0.1}, softplus(-0.3) + softplus(0.15)),
        (
            {"label_smoothing": 0.2},
            0.8 * (softplus(-1.5) + softplus(0.75)) + 0.2 * (softplus(1.5) + softplus(-0.75)),
        ),
        ({"loss": "ipo"}, (3 - 1) ** 2 + (-1.5 - 1) ** 2),
        ({"loss": "ipo", "beta": 0.25}, (3 - 2) ** 2 + (-1.5 - 2) ** 2),
    ],
)
def test_the_loss_by_hand(fields: dict[str, Any], expected: float) -> None:
    algorithm, batch = dpo(**fields), pairs()
    total, means = algorithm.loss(batch, forward_of(batch, 2.0, -1.0, -1.0, 0.5))
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert means["loss/policy"] == pytest.approx((expected, 2), rel=1e-5)
    assert algorithm.terms(batch) == 2


def test_smoothed_labels_are_refused_where_the_loss_would_ignore_them() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.1 and loss is ipo.*set it to 0, or loss to sigmoid"):
        DPOSettings(loss="ipo", label_smoothing=0.1)


def test_what_is_logged_by_hand() -> None:
    batch = pairs()
    _, means = dpo().loss(batch, forward_of(batch, 2.0, -1.0, -1.0, 0.5))
    assert means["policy/pair_accuracy"] == (1, 2)
    assert means["policy/margin"] == pytest.approx((0.5 * (3 - 1.5), 2))
    assert means["policy/chosen_reward"] == pytest.approx((0.5 * (2 - 1), 2))
    assert means["policy/rejected_reward"] == pytest.approx((0.5 * (-1 + 0.5), 2))
    assert means["policy/chosen_logprob"] == pytest.approx(((-3 + 2) + (-3 - 1), 2))
    assert means["policy/entropy"] == (18, 9)


def test_equal_ratios_are_no_right_order() -> None:
    batch = pairs()
    total, means = dpo().loss(batch, forward_of(batch, 0.0, 0.0, 0.0, 0.0))
    assert total.item() == pytest.approx(2 * math.log(2))
    assert means["policy/pair_accuracy"] == (0, 2)
    assert dpo().loss(batch, forward_of(batch, 0.5, 0.0, 0.0, -0.1))[1]["policy/pair_accuracy"] == (2, 2)


def test_descent_makes_the_chosen_response_likelier_and_the_rejected_one_less_likely() -> None:
    batch = pairs()
    assert batch.ref_logprobs is not None
    logprobs = batch.ref_logprobs.clone().requires_grad_()
    dpo().loss(batch, Forward(logprobs, torch.zeros(4, 3)))[0].backward()
    assert logprobs.grad is not None
    signs = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
    torch.testing.assert_close(logprobs.grad, 0.25 * signs * batch.mask)  # beta s(0) at every token of a response


def test_every_response_token_counts_the_first_and_the_last_and_no_padding() -> None:
    # safe-rlhf's slice leaves the first differing token out and takes a padding token in.
    batch = pairs()
    base = dpo().loss(batch, forward_of(batch, 0.0, 0.0, 0.0, 0.0))[0]
    for row in range(4):
        for place in range(3):
            forward = forward_of(batch, 0.0, 0.0, 0.0, 0.0)
            forward.logprobs[row, place] += 1.0
            change = dpo().loss(batch, forward)[0] - base
            expected = (-1 if row % 2 == 0 else 1) if MASK[row, place] else 0
            assert int(torch.sign(change)) == expected, (row, place)


def test_what_both_responses_begin_with_cancels_out() -> None:
    batch = pairs()
    shared = forward_of(batch, 0.7, 0.7, 0.7, 0.7)  # the first tokens, as if they were the same
    plain = forward_of(batch, 0.0, 0.0, 0.0, 0.0)
    for fields in ({}, {"loss": "ipo"}, {"label_smoothing": 0.3}):
        torch.testing.assert_close(dpo(**fields).loss(batch, shared)[0], dpo(**fields).loss(batch, plain)[0])


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
@pytest.mark.parametrize("micro", [1, 3, 4])
def test_micro_batches_change_no_gradient_and_no_mean(loss: str, micro: int, update_gradient: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.randint(1, 6, (12, 1), generator=generator)
    batch = Batch(
        torch.zeros(12, 7, dtype=torch.long),
        torch.cat([torch.ones(12, 2).bool(), mask], 1),
        mask,
        ref_logprobs=torch.randn(12, 5, generator=generator),
        unit=2,
    )
    (whole, means), (cut, cut_means) = (update_gradient(dpo(loss=loss), batch, size) for size in (100, micro))
    torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-5)
    assert cut_means == pytest.approx(means, rel=1e-5)
    assert whole[0].abs().sum() > 0 and whole[1:].abs().sum() == 0


def test_dpo_is_what_its_settings_name_and_keeps_no_state() -> None:
    def alone(tensor: Tensor) -> Tensor:
        return tensor

    algorithm = build(DPOSettings(), alone, 16)
    assert type(algorithm) is DPO and algorithm.state_dict() == {}
    algorithm.load_state_dict({})


def test_dpo_learns_the_word_that_people_prefer(bandit: Any, word_scorer: Any) -> None:
    learned = bandit.learn(bandit.settings(DPOSettings()), word_scorer({"a": 1.0}))
    assert learned["p/a"] > 0.6 and learned["policy/pair_accuracy"] == 1
    assert learned["policy/chosen_reward"] > 0 > learned["policy/rejected_reward"]
    assert "policy/first_ratio_gap" not in learned  # no policy sampled these pairs


def test_ipo_learns_it_too_and_stops_where_the_margin_is_what_it_asks_for(bandit: Any, word_scorer: Any) -> None:
    settings = bandit.settings(DPOSettings(loss="ipo", beta=0.2), rollouts=60)
    learned = bandit.learn(settings, word_scorer({"a": 1.0}))
    # h is to be 1 / (2 beta), of which beta is taken: one half
    assert learned["policy/margin"] == pytest.approx(0.5, abs=0.1)
    assert learned["policy/pair_accuracy"] == 1


def test_a_sign_error_breaks_it(bandit: Any, word_scorer: Any) -> None:
    learned = bandit.learn(bandit.settings(DPOSettings()), word_scorer({"a": 1.0}, sign=-1.0))
    assert learned["p/a"] < 0.02
