"""Learning from pairs: losses, signs, normalisation and held-out metrics by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components.models import load_scalar
from components.packed import Packed
from components.records import Message, Preference
from components.reward.measures import ensemble_metrics, held_out_metrics
from components.reward.members import normalization
from components.reward.pairs import (
    Pair,
    PairObjective,
    PairScores,
    cost_loss,
    encode_pairs,
    ranking_loss,
    score_pairs,
)
from components.tokens import encode_response


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def preference(
    chosen: str, rejected: str, chosen_safe: bool | None = None, rejected_safe: bool | None = None
) -> Preference:
    prompt = (Message("user", "say red"),)
    return Preference("1", prompt, chosen, rejected, "harmless", chosen_safe, rejected_safe, "made")


def pairs_with_signs(*signs: tuple[float, float]) -> list[Pair]:
    return [Pair([10, 11, 1], [10, 12, 13, 1], *both) for both in signs]


def test_the_ranking_loss_by_hand() -> None:
    loss = ranking_loss(torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.0, 0.0, 1.0]))
    assert loss.tolist() == pytest.approx([-log_sigmoid(2), math.log(2), -log_sigmoid(-2)])


def test_the_cost_loss_by_hand() -> None:
    # Safe chosen at -1.5, unsafe rejected at 0.5: order s(2), signs s(1.5) and s(0.5).
    chosen, rejected = torch.tensor([-1.5]), torch.tensor([0.5])
    loss = cost_loss(chosen, rejected, torch.tensor([-1.0]), torch.tensor([1.0]))
    assert loss.item() == pytest.approx(-log_sigmoid(2) - log_sigmoid(1.5) - log_sigmoid(0.5))


def test_an_absent_flag_adds_nothing_but_the_order() -> None:
    chosen, rejected = torch.tensor([3.0, 3.0]), torch.tensor([1.0, 1.0])
    loss = cost_loss(chosen, rejected, torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]))
    assert loss.tolist() == pytest.approx([-log_sigmoid(-2), -log_sigmoid(-2) - log_sigmoid(3)])


def test_descent_raises_the_better_reward_and_the_worse_cost() -> None:
    scores = torch.zeros(2, requires_grad=True)
    (reward_gradient,) = torch.autograd.grad(ranking_loss(scores[:1], scores[1:]).sum(), scores)
    assert reward_gradient.tolist() == pytest.approx([-0.5, 0.5])
    unknown = torch.zeros(1)
    (cost_gradient,) = torch.autograd.grad(cost_loss(scores[:1], scores[1:], unknown, unknown).sum(), scores)
    assert cost_gradient.tolist() == pytest.approx([0.5, -0.5])


@pytest.mark.parametrize(("sign", "direction"), [(1.0, 1), (-1.0, -1)])
def test_descent_moves_an_unsafe_cost_up_and_a_safe_one_down(sign: float, direction: int) -> None:
    cost = torch.zeros(1, requires_grad=True)
    loss = cost_loss(cost, cost, torch.tensor([sign]), torch.zeros(1))  # the order term cancels
    (gradient,) = torch.autograd.grad(loss.sum(), cost)
    assert torch.sign(-gradient).item() == direction


def test_flags_become_signs_with_unsafe_above_zero(tokenizer: Any) -> None:
    rows = [preference("a", "b", True, False), preference("a", "b", None, True), preference("a", "b")]
    pairs = encode_pairs(rows, tokenizer, 64)
    assert [(pair.chosen_sign, pair.rejected_sign) for pair in pairs] == [(-1, 1), (0, -1), (0, 0)]


def test_pairs_share_the_prompt_and_end_with_the_end_token(tokenizer: Any) -> None:
    (pair,) = encode_pairs([preference("yes", "no, never")], tokenizer, 64)
    assert tokenizer.decode(pair.chosen) == "<|user|>say red<|assistant|>yes<|end|>"
    assert tokenizer.decode(pair.rejected) == "<|user|>say red<|assistant|>no, never<|end|>"
    (cut,) = encode_pairs([preference("yes", "no, never")], tokenizer, 8)
    assert len(cut.rejected) == 8
    shared = len(cut.chosen) - len(encode_response(tokenizer, "yes"))
    assert cut.chosen[:shared] == cut.rejected[:shared]  # one prompt for both, cut for the longer response
    assert cut.chosen[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("swap", [False, True])
def test_the_prompt_leaves_room_for_the_longer_response(tokenizer: Any, swap: bool) -> None:
    short, long = (encode_response(tokenizer, text) for text in ("zoo", "no, never"))
    assert short > long and len(short) < len(long)  # by their first ids, which must not decide
    row = preference("no, never", "zoo") if swap else preference("zoo", "no, never")
    (pair,) = encode_pairs([row], tokenizer, len(long) + 2)
    first, second = (pair.rejected, pair.chosen) if swap else (pair.chosen, pair.rejected)
    assert first[2:] == short and second[2:] == long and first[:2] == second[:2]


def test_a_response_longer_than_everything_is_cut_and_keeps_one_prompt_token(tokenizer: Any) -> None:
    long = encode_response(tokenizer, "never " * 20)
    (pair,) = encode_pairs([preference("yes", "never " * 20)], tokenizer, 8)
    assert pair.rejected[1:] == long[:7] and pair.chosen[0] == pair.rejected[0]


class LastId(nn.Module):
    """Scores every token by its id."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ParameterDict({"scale": nn.Parameter(torch.ones(()))})

    def forward(self, packed: Packed, places: Tensor) -> Tensor:
        return self.model["scale"] * packed.input_ids.flatten()[places].float()


# Scores 3 over 1, 2 over 6, 4 over 4
SCORED = [Pair([9, 3], [9, 9, 1], -1.0, 1.0), Pair([9, 9, 9, 2], [6], 0.0, -1.0), Pair([4], [9, 4], 0.0, 0.0)]


@pytest.mark.parametrize(
    ("kind", "loss", "right", "margin"),
    [
        ("reward", -log_sigmoid(2) - log_sigmoid(-4) - log_sigmoid(0), 1, 2 - 4),
        # order, then the signs: -1 of 3, +1 of 1, -1 of 6
        (
            "cost",
            -log_sigmoid(-2) - log_sigmoid(4) - log_sigmoid(0) - log_sigmoid(-3) - log_sigmoid(1) - log_sigmoid(-6),
            1,
            -2 + 4,
        ),
    ],
)
def test_the_objective_by_hand(kind: Any, loss: float, right: int, margin: float) -> None:
    found = PairObjective(kind, 0.1).loss(LastId(), SCORED)
    squares = 0.1 * (9 + 1 + 4 + 36 + 16 + 16) / 2
    assert found.total.item() == pytest.approx(loss + squares, rel=1e-5)
    assert found.total.requires_grad
    assert found.sums == {"train/accuracy": right, "train/margin": pytest.approx(margin)}  # a tie is not right


def test_a_pair_is_one_term_and_costs_its_padded_tokens() -> None:
    objective = PairObjective("reward", 0.0)
    assert [objective.length(pair) for pair in SCORED] == [6, 8, 4]
    assert [objective.terms(pair) for pair in SCORED] == [1, 1, 1]


def test_scored_pairs_keep_sides_and_order_and_the_model_ends_in_eval_mode() -> None:
    model = LastId().train()
    scores = score_pairs(model, PairObjective("reward", 0.0), SCORED, batch_tokens=6)
    assert (scores.chosen.tolist(), scores.rejected.tolist()) == ([3, 2, 4], [1, 6, 4])
    assert not model.training and not scores.chosen.requires_grad


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_the_objective_sums_the_losses_and_counts_right_orders(kind: Any, reward_folder: Path) -> None:
    scalar = load_scalar(reward_folder)
    pairs = [*pairs_with_signs((-1.0, 1.0), (0.0, 1.0)), Pair([20, 21, 1], [22, 1], 0.0, 0.0)]
    objective = PairObjective(kind, regularization=0.1)
    with torch.no_grad():
        loss = objective.loss(scalar, pairs)
        chosen, rejected = (
            torch.stack(
                [scalar.score(torch.tensor([ids]), torch.ones(1, len(ids)).bool())[0] for ids in rows]
            )
            for rows in ([p.chosen for p in pairs], [p.rejected for p in pairs])
        )
    signs = torch.tensor([[p.chosen_sign, p.rejected_sign] for p in pairs])
    each = (
        ranking_loss(chosen, rejected) if kind == "reward" else cost_loss(chosen, rejected, *signs.unbind(1))
    )
    expected = each.sum() + 0.1 * (chosen.square() + rejected.square()).sum() / 2
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-4)
    right = chosen > rejected if kind == "reward" else chosen < rejected
    assert loss.sums["train/accuracy"] == right.sum().item()


def test_both_responses_of_a_pair_are_read_with_one_copy_of_what_they_begin_with(reward_folder: Path) -> None:
    scalar, read = load_scalar(reward_folder), list[int]()
    scalar.model.model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    prompt = list(range(10, 40))
    PairObjective("reward", 0.0).scores(scalar, [Pair([*prompt, 50, 51], [*prompt, 52], 0.0, 0.0)])
    assert read == [33]


def test_scores_come_in_the_pairs_order_whatever_the_batches(reward_folder: Path) -> None:
    scalar, objective = load_scalar(reward_folder), PairObjective("reward", 0.0)
    pairs = [Pair([10] * length + [1], [20, 1], 0.0, 0.0) for length in (9, 2, 5, 1)]
    small, large = (score_pairs(scalar, objective, pairs, batch_tokens) for batch_tokens in (16, 1000))
    torch.testing.assert_close(small.chosen, large.chosen, atol=1e-5, rtol=1e-5)
    assert small.chosen.unique().numel() == 4
    torch.testing.assert_close(small.rejected, small.rejected[:1].expand(4), atol=1e-5, rtol=1e-5)


def test_held_out_ties_count_half() -> None:
    scores = PairScores(torch.tensor([2.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 3.0, 0.0]))
    metrics = held_out_metrics(scores, pairs_with_signs(*[(0.0, 0.0)] * 4), "reward")
    assert metrics["eval/accuracy"] == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert metrics["eval/accuracy_low"] < 0.5 < metrics["eval/accuracy_high"]
    assert metrics["eval/num_pairs"] == 4
    assert metrics["eval/margin"] == pytest.approx((1 + 0 - 3 + 0) / 4)


def test_an_untrained_model_is_right_half_the_time() -> None:
    zeros = torch.zeros(6)
    metrics = held_out_metrics(PairScores(zeros, zeros), pairs_with_signs(*[(-1.0, 1.0)] * 6), "cost")
    assert metrics["eval/accuracy"] == 0.5
    assert metrics["eval/sign_accuracy"] == 0  # zero is on neither side


def test_a_cost_is_right_when_the_rejected_response_costs_more() -> None:
    scores = PairScores(torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 1.0]))
    pairs = pairs_with_signs((-1.0, 1.0), (-1.0, 0.0))
    metrics = held_out_metrics(scores, pairs, "cost")
    assert metrics["eval/accuracy"] == 0.5
    # Flagged: -1 safe right, +1 unsafe right, 2 stated safe wrong; the fourth has no flag.
    assert metrics["eval/sign_accuracy"] == pytest.approx(2 / 3)
    assert "eval/sign_accuracy" not in held_out_metrics(scores, pairs, "reward")
    assert "eval/sign_accuracy" not in held_out_metrics(scores, pairs_with_signs((0, 0), (0, 0)), "cost")
    assert held_out_metrics(PairScores(torch.zeros(0), torch.zeros(0)), [], "cost") == {}


def test_the_calibration_error_by_hand() -> None:
    # Margins ln 3 and -ln 3: both state 0.75, one of two comes true.
    scores = PairScores(torch.tensor([math.log(3), 0.0]), torch.tensor([0.0, math.log(3)]))
    metrics = held_out_metrics(scores, pairs_with_signs((0, 0), (0, 0)), "reward")
    assert metrics["eval/calibration_error"] == pytest.approx(0.25, abs=1e-6)


def test_an_ensembles_metrics_by_hand() -> None:
    # Pair 1: margins 3 and -1, the mean is right though one member is not. Pair 2: -2 and 2, a tie.
    members = [
        PairScores(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 2.0])),
        PairScores(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])),
    ]
    metrics = ensemble_metrics(members, "reward")
    assert metrics["eval/ensemble_accuracy"] == (1 + 0.5) / 2
    assert metrics["eval/disagreement"] == pytest.approx(1.0)  # two members 2 apart deviate by 1 from their mean
    assert ensemble_metrics(members, "cost")["eval/ensemble_accuracy"] == (0 + 0.5) / 2
    assert ensemble_metrics([PairScores(torch.zeros(0), torch.zeros(0))] * 2, "reward") == {}


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_normalisation_keeps_the_zero_of_costs(kind: Any, cost_folder: Path) -> None:
    scalar = load_scalar(cost_folder)
    scalar.std = 1.0
    pairs = [Pair([number, 11, 1], [number, 12, 1], 0.0, 0.0) for number in range(10, 30)]
    objective = PairObjective(kind, 0.0)
    scores = score_pairs(scalar, objective, pairs, 1000)
    both = torch.cat([scores.chosen, scores.rejected])
    mean, std = normalization(scalar, objective, pairs, 1000)
    assert std == pytest.approx(both.std().item())
    assert mean == (pytest.approx(both.mean().item()) if kind == "reward" else 0.0)
    scalar.mean, scalar.std = mean, std
    after = score_pairs(scalar, objective, pairs, 1000)
    assert torch.cat([after.chosen, after.rejected]).std().item() == pytest.approx(1, rel=1e-3)
    if kind == "cost":
        assert torch.equal(after.chosen > 0, scores.chosen > 0)
