"""The mathematics of reinforcement learning, against hand arithmetic, enumeration and brute force."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from components.divergence import kl_estimate
from components.rl.functional import (
    clipped_policy_loss,
    clipped_value_loss,
    eos_rule,
    flat_groups,
    gae,
    group_advantages,
    last_token,
    leave_one_out,
    loss_terms,
    loss_weights,
    masked_mean,
    masked_sum,
    preference_loss,
    sequence_sums,
    token_rewards,
    whiten,
)

F64 = torch.float64


def alone(tensor: Tensor) -> Tensor:
    """The sum over the processes of a run with one process."""
    return tensor


def random_mask(rows: int, width: int, seed: int) -> Tensor:
    """Response masks (B, R) of random lengths, 1 or more."""
    lengths = torch.randint(1, width + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    return torch.arange(width) < lengths[:, None]


def random_numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def categorical_pair() -> tuple[Tensor, Tensor]:
    """Log-probabilities (V,) of two distributions over five tokens."""
    policy, reference = random_numbers(2, 5, seed=3).log_softmax(-1)
    return policy, reference


def test_masked_mean_is_over_tokens_and_not_over_rows() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [10.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert masked_mean(values, mask).item() == pytest.approx((1 + 2 + 3 + 10) / 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_lies_outside_the_mask_never_matters(bad: float) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    clean, other = random_numbers(2, 3, seed=0) * mask, random_numbers(2, 3, seed=1) * mask
    dirty, dirty_other = clean.masked_fill(~mask, bad), other.masked_fill(~mask, bad)
    scores = torch.tensor([1.0, -2.0], dtype=F64)
    pairs = [
        (masked_sum(clean, mask), masked_sum(dirty, mask)),
        (whiten(clean, mask, alone), whiten(dirty, mask, alone)),
        (token_rewards(scores, clean, mask), token_rewards(scores, dirty, mask)),
        *zip(gae(clean, other, mask, 0.9, 0.8), gae(dirty, dirty_other, mask, 0.9, 0.8), strict=True),
        (
            clipped_value_loss(clean, other, other * 2, mask, 0.2),
            clipped_value_loss(dirty, dirty_other, dirty_other * 2, mask, 0.2),
        ),
        *zip(
            clipped_policy_loss(clean, other, other * 2, mask, 0.2),
            clipped_policy_loss(dirty, dirty_other, dirty_other * 2, mask, 0.2),
            strict=True,
        ),
    ]
    for expected, seen in pairs:
        assert torch.equal(expected, seen)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_gradient_comes_from_outside_the_mask(bad: float) -> None:
    mask = torch.tensor([[True, True, False]])
    old, target = torch.tensor([[0.1, 0.2, bad]]), torch.tensor([[0.5, -0.5, bad]])
    for loss in (
        lambda new: clipped_policy_loss(new, old, target, mask, 0.2).total,
        lambda new: clipped_value_loss(new, old, target, mask, 0.2),
    ):
        new = torch.tensor([[0.15, 0.25, bad]], requires_grad=True)
        loss(new).backward()
        assert new.grad is not None and torch.isfinite(new.grad).all()
        assert new.grad[0, 2] == 0 and (new.grad[0, :2] != 0).all()
    new = torch.tensor([[0.15, 0.25, 0.0]], requires_grad=True)  # here the advantage alone is bad
    clipped_policy_loss(new, torch.zeros(1, 3), target, mask, 0.2).total.backward()
    assert new.grad is not None and new.grad[0, 2] == 0


def test_whitened_values_have_mean_zero_and_deviation_one_over_the_mask() -> None:
    mask = random_mask(6, 9, seed=2)
    whitened = whiten(random_numbers(6, 9, seed=4) * 3 + 5, mask, alone)
    assert whitened[mask].mean().item() == pytest.approx(0, abs=1e-9)
    assert whitened[mask].std(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    assert (whitened[~mask] == 0).all()


def test_whitening_by_hand_with_and_without_the_mean() -> None:
    values, mask = torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]])
    # mean 2, variance ((1-2)^2 + (3-2)^2) / 2 = 1
    assert whiten(values, mask, alone).tolist() == [pytest.approx([-1, 1, 0])]
    assert whiten(values, mask, alone, shift_mean=False).tolist() == [pytest.approx([1, 3, 0])]


def test_whitening_equal_values_gives_zeros_and_no_nan() -> None:
    assert whiten(torch.full((1, 3), 7.0), torch.ones(1, 3).bool(), alone).tolist() == [[0, 0, 0]]


def in_two_processes(work: Callable[[int, Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
    """The results, one below the other, of two processes that do `work(rank, total)`."""
    slots: list[Tensor] = [torch.zeros(())] * 2
    barrier = threading.Barrier(2, timeout=10)

    def process(rank: int) -> Tensor:
        def total(tensor: Tensor) -> Tensor:
            slots[rank] = tensor
            barrier.wait()
            both = slots[0] + slots[1]
            barrier.wait()
            return both

        return work(rank, total)

    with ThreadPoolExecutor(2) as pool:
        return torch.cat(list(pool.map(process, range(2))))


def test_whitening_over_two_processes_equals_whitening_their_rows_together() -> None:
    values, mask = random_numbers(8, 5, seed=5), random_mask(8, 5, seed=6)
    halves = in_two_processes(lambda rank, total: whiten(values.chunk(2)[rank], mask.chunk(2)[rank], total))
    torch.testing.assert_close(halves, whiten(values, mask, alone))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_expected_estimate_is_the_exact_kl(estimator: str) -> None:
    policy, reference = categorical_pair()
    exact = (policy.exp() * (policy - reference)).sum()
    expected = (policy.exp() * kl_estimate(policy, reference, estimator)).sum()  # type: ignore[arg-type]
    assert expected.item() == pytest.approx(exact.item(), rel=1e-12)


def test_sampled_k1_and_k3_approach_the_exact_kl_and_k3_with_less_variance() -> None:
    policy, reference = categorical_pair()
    exact = (policy.exp() * (policy - reference)).sum().item()
    draws = torch.multinomial(policy.exp(), 100_000, True, generator=torch.Generator().manual_seed(1))
    k1, k3 = (kl_estimate(policy[draws], reference[draws], name) for name in ("k1", "k3"))
    assert k1.mean().item() == pytest.approx(exact, abs=4 * k1.std().item() / math.sqrt(len(draws)))
    assert k3.mean().item() == pytest.approx(exact, abs=4 * k3.std().item() / math.sqrt(len(draws)))
    assert k3.var() < k1.var()


def test_estimates_by_hand() -> None:
    # ratio reference / policy = 2: d = ln 2
    policy, reference = torch.tensor([math.log(0.25)]), torch.tensor([math.log(0.5)])
    assert kl_estimate(policy, reference, "k1").item() == pytest.approx(-math.log(2))
    assert kl_estimate(policy, reference, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_estimate(policy, reference, "k3").item() == pytest.approx(2 - math.log(2) - 1)


def test_k1_may_be_negative_where_k2_and_k3_never_are() -> None:
    policy, reference = random_numbers(2, 1000, seed=8)
    assert (kl_estimate(policy, reference, "k1") < 0).any()
    assert (kl_estimate(policy, reference, "k2") >= 0).all()
    assert (kl_estimate(policy, reference, "k3") >= 0).all()
    same = torch.zeros(3)
    assert all((kl_estimate(same, same, name) == 0).all() for name in ("k1", "k2", "k3"))


def test_as_a_loss_k2_has_the_gradient_of_the_kl_and_k1_none() -> None:
    reference = categorical_pair()[1]
    logits = random_numbers(5, seed=9).requires_grad_()
    policy = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    weights = policy.exp().detach()  # the expectation over samples, through which no gradient flows
    (k2,) = torch.autograd.grad(
        (weights * kl_estimate(policy, reference, "k2")).sum(), logits, retain_graph=True
    )
    (k1,) = torch.autograd.grad((weights * kl_estimate(policy, reference, "k1")).sum(), logits)
    torch.testing.assert_close(k2, exact)
    torch.testing.assert_close(k1, torch.zeros(5, dtype=F64))


def test_an_extreme_log_ratio_overflows_nothing() -> None:
    far = torch.tensor([[-1000.0, 1000.0]])
    assert torch.isfinite(kl_estimate(torch.zeros(1, 2), far, "k3")).all()
    mask = torch.ones(1, 2, dtype=torch.bool)
    new = far.clone().requires_grad_()
    loss = clipped_policy_loss(new, torch.zeros(1, 2), torch.tensor([[-1.0, -1.0]]), mask, 0.2).total
    loss.backward()
    assert torch.isfinite(loss)
    assert new.grad is not None and torch.isfinite(new.grad).all()


def test_log_ratios_are_clamped_at_twenty_on_both_sides() -> None:
    far, zeros = torch.tensor([[-1000.0, 1000.0]], dtype=F64), torch.zeros(1, 2, dtype=F64)
    estimates = [kl_estimate(zeros, far, name) for name in ("k1", "k2", "k3")]
    assert estimates[0].tolist() == [[20, -20]]
    assert estimates[1].tolist() == [[200, 200]]
    assert estimates[2].tolist() == [pytest.approx([math.exp(-20) + 20 - 1, math.exp(20) - 20 - 1])]
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = clipped_policy_loss(far, zeros, -torch.ones(1, 2, dtype=F64), mask, 0.2)
    assert loss.ratio.item() == pytest.approx(math.exp(20) + math.exp(-20))
    assert loss.total.item() == pytest.approx(math.exp(20) + 0.8)


def test_the_score_lands_on_the_last_response_token() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    penalty = torch.tensor([[0.1, 0.2, 9.0], [0.0, 0.0, 0.5]])
    rewards = token_rewards(torch.tensor([1.0, 2.0]), penalty, mask)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 0.8, 0.0], [0.0, 0.0, 1.5]]))
    assert last_token(mask).tolist() == [[False, True, False], [False, False, True]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
def test_advantages_equal_the_brute_force_sum_over_deltas(gamma: float, lam: float) -> None:
    rewards, values, mask = (
        random_numbers(5, 7, seed=10),
        random_numbers(5, 7, seed=11),
        random_mask(5, 7, 12),
    )
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    expected = torch.zeros(5, 7, dtype=F64)
    for row in range(5):
        length = int(mask[row].sum())
        after = [*values[row, :length].tolist()[1:], 0.0]
        deltas = [rewards[row, t].item() + gamma * after[t] - values[row, t].item() for t in range(length)]
        for t in range(length):
            expected[row, t] = sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, length))
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, (expected + values) * mask)


def test_a_response_of_one_token_has_the_advantage_of_its_reward_over_its_value() -> None:
    advantages, returns = gae(torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([[True]]), 0.9, 0.8)
    assert (advantages.tolist(), returns.tolist()) == ([[2]], [[3]])


def test_nothing_leaks_across_the_end_of_a_response() -> None:
    rewards, values, mask = (
        random_numbers(4, 6, seed=13),
        random_numbers(4, 6, seed=14),
        random_mask(4, 6, 15),
    )
    noise = random_numbers(4, 6, seed=16) * 100 * ~mask
    for clean, noisy in zip(
        gae(rewards, values, mask, 1.0, 0.95),
        gae(rewards + noise, values - noise, mask, 1.0, 0.95),
        strict=True,
    ):
        assert torch.equal(clean, noisy)
        assert (clean[~mask] == 0).all()


def test_the_policy_loss_by_hand() -> None:
    # Ratios 1.5, 0.5, 1.5, 0.5, 1.1; clip 0.2. min(ratio A, clipped ratio A):
    # A=+1: min(1.5, 1.2) = 1.2 clipped; A=+1: min(0.5, 0.8) = 0.5; A=-1: min(-1.5, -1.2) = -1.5;
    # A=-1: min(-0.5, -0.8) = -0.8 clipped; A=+2: 2.2. Sum 1.6.
    ratios = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1, 7.0]], dtype=F64)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 2.0, 5.0]], dtype=F64)
    mask = torch.tensor([[True] * 5 + [False]])
    loss = clipped_policy_loss(ratios.log(), torch.zeros(1, 6, dtype=F64), advantages, mask, 0.2)
    assert loss.total.item() == pytest.approx(-1.6)
    assert loss.clipped.item() == 2
    assert loss.ratio.item() == pytest.approx(1.5 + 0.5 + 1.5 + 0.5 + 1.1)
    assert loss.approx_kl.item() == pytest.approx(sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.5, 0.5, 1.1)))


def test_ratio_one_clips_nothing_and_is_the_plain_policy_gradient() -> None:
    old, advantages = random_numbers(3, 4, seed=17), random_numbers(3, 4, seed=18)
    mask = random_mask(3, 4, seed=19)
    new = old.clone().requires_grad_()
    loss = clipped_policy_loss(new, old, advantages, mask, 0.2)
    loss.total.backward()
    assert loss.clipped == 0 and loss.approx_kl == 0
    assert new.grad is not None
    torch.testing.assert_close(new.grad, -(advantages * mask))


@pytest.mark.parametrize(
    ("ratio", "advantage", "direction"),
    [(1.0, 1.0, 1), (1.0, -1.0, -1), (1.5, 1.0, 0), (1.5, -1.0, -1), (0.5, 1.0, 1), (0.5, -1.0, 0)],
)
def test_descent_moves_a_logprob_towards_its_advantage_until_the_clip(
    ratio: float, advantage: float, direction: int
) -> None:
    new = torch.tensor([[math.log(ratio)]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    clipped_policy_loss(new, torch.zeros(1, 1), torch.tensor([[advantage]]), mask, 0.2).total.backward()
    assert new.grad is not None
    assert int(torch.sign(-new.grad).item()) == direction


def test_the_value_loss_by_hand() -> None:
    # Old value 0, clip 0.2. Value 1, return 2: max((1-2)^2, (0.2-2)^2) = 3.24.
    # Value 1.5, return 0: max(2.25, 0.04) = 2.25.
    # Value 0.1, return 1: 0.81 both ways.
    values, returns = torch.tensor([[1.0, 1.5, 0.1, 5.0]]), torch.tensor([[2.0, 0.0, 1.0, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    loss = clipped_value_loss(values, torch.zeros(1, 4), returns, mask, 0.2)
    assert loss.item() == pytest.approx((3.24 + 2.25 + 0.81) / 2)


def test_weights_give_every_token_its_share_of_a_loss() -> None:
    ratios, mask = torch.tensor([[1.1, 0.9], [1.0, 5.0]], dtype=F64), torch.tensor([[True, True], [True, False]])
    weights = torch.tensor([[0.5, 0.25], [3.0, 7.0]], dtype=F64)
    loss = clipped_policy_loss(
        ratios.log(), torch.zeros(2, 2, dtype=F64), torch.ones(2, 2, dtype=F64), mask, 0.2, weights=weights
    )
    assert loss.total.item() == pytest.approx(-(0.5 * 1.1 + 0.25 * 0.9 + 3.0))
    assert loss.ratio.item() == pytest.approx(3.0)  # what is only watched has no weights
    values = torch.tensor([[1.0, 2.0], [3.0, 9.0]], dtype=F64)
    value_loss = clipped_value_loss(values, values, torch.zeros(2, 2, dtype=F64), mask, 0.2, weights)
    assert value_loss.item() == pytest.approx((0.5 * 1 + 0.25 * 4 + 3 * 9) / 2)


def test_a_higher_upper_bound_leaves_the_lower_one() -> None:
    # Ratios 1.5 and 0.5, clip 0.2 and 0.4: A=+1 min(1.5, 1.4) = 1.4; A=-1 min(-0.5, -0.8) = -0.8.
    ratios, advantages = torch.tensor([[1.5, 0.5]], dtype=F64), torch.tensor([[1.0, -1.0]], dtype=F64)
    mask, old = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=F64)
    loss = clipped_policy_loss(ratios.log(), old, advantages, mask, 0.2, clip_high=0.4)
    assert loss.total.item() == pytest.approx(-(1.4 - 0.8))
    assert loss.clipped.item() == 2
    assert clipped_policy_loss(ratios.log(), old, advantages, mask, 0.2, clip_high=0.6).clipped.item() == 1


def test_dual_clip_bounds_the_objective_where_the_advantage_is_negative_and_nowhere_else() -> None:
    # Ratio 5: A=-1 max(-5, 3 * -1) = -3, A=-2 max(-10, -6) = -6; ratio 2, A=-1: -2 is above -3;
    # ratio 5, A=+0.5: 0.6, as without; A=0: 0.
    ratios = torch.tensor([[5.0, 5.0, 2.0, 5.0, 5.0]], dtype=F64)
    advantages = torch.tensor([[-1.0, -2.0, -1.0, 0.5, 0.0]], dtype=F64)
    mask, old = torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 5, dtype=F64)
    loss = clipped_policy_loss(ratios.log(), old, advantages, mask, 0.2, dual_clip=3.0)
    assert loss.total.item() == pytest.approx(3 + 6 + 2 - 0.6)
    assert loss.clipped.item() == 3
    without = clipped_policy_loss(ratios.log(), old, advantages, mask, 0.2)
    assert without.total.item() == pytest.approx(5 + 10 + 2 - 0.6)


def test_what_is_watched_carries_no_gradient() -> None:
    new = torch.zeros(1, 2, requires_grad=True)
    loss = clipped_policy_loss(new, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2).bool(), 0.2)
    assert loss.total.requires_grad
    assert not (loss.clipped.requires_grad or loss.approx_kl.requires_grad or loss.ratio.requires_grad)


def test_sums_and_means_over_responses_by_hand() -> None:
    values, mask = torch.tensor([[1.0, 2.0, 99.0], [4.0, 5.0, 6.0]]), torch.tensor([[True, True, False], [True] * 3])
    assert masked_sum(values, mask).item() == 18
    assert sequence_sums(values, mask).tolist() == [3, 15]


def test_what_a_token_weighs_and_what_the_sum_is_divided_by() -> None:
    mask = torch.tensor([[True, True, False, False], [True] * 4, [False] * 4, [True, False, False, False]])
    for name in ("token", "constant"):
        assert loss_weights(mask, name).tolist() == mask.float().tolist()
    assert loss_weights(mask, "sequence").tolist() == [[0.5, 0.5, 0, 0], [0.25] * 4, [0] * 4, [1, 0, 0, 0]]
    assert {name: loss_terms(mask, name, 10) for name in ("token", "sequence", "constant")} == {
        "token": 7, "sequence": 4, "constant": 40
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "expected"), [("penalty", [2.0, -1.5, 0.5]), ("replace", [2.0, -0.5, -0.5]), ("none", [2.0, -1.0, 1.0])]
)
def test_the_rules_for_a_missing_end_by_hand(rule: str, expected: list[float]) -> None:
    scores, ended = torch.tensor([2.0, -1.0, 1.0]), torch.tensor([True, False, False])
    assert eos_rule(scores, ended, rule, 0.5).tolist() == expected  # type: ignore[arg-type]


def test_leaving_one_out_by_hand() -> None:
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2
    assert leave_one_out(torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3).tolist() == [-3, -1.5, 4.5, 0, 0, 0]
    assert leave_one_out(torch.tensor([1.0, 4.0, 7.0, 7.5]), 2).tolist() == [-3, 3, -0.5, 0.5]


def test_the_baseline_ignores_the_own_reward_and_the_other_prompts() -> None:
    rewards = random_numbers(12, seed=20)
    advantages = leave_one_out(rewards, 4)
    for row in range(12):
        group = row // 4 * 4
        others = [rewards[other].item() for other in range(group, group + 4) if other != row]
        assert advantages[row].item() == pytest.approx(rewards[row].item() - sum(others) / 3)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("none", [-2.0, -1.0, 3.0, -1.0, 1.0, 0.0]),
        # unbiased deviations sqrt(14 / 2) and 1, plus eps 0.5
        ("group", [*(x / (math.sqrt(7) + 0.5) for x in (-2.0, -1.0, 3.0)), -1 / 1.5, 1 / 1.5, 0.0]),
        # rewards 1 2 6 9 11 10: mean 6.5, squares 5.5^2 + 4.5^2 + 0.5^2 + 2.5^2 + 4.5^2 + 3.5^2 = 89.5, over 5
        ("batch", [x / (math.sqrt(89.5 / 5) + 0.5) for x in (-2.0, -1.0, 3.0, -1.0, 1.0, 0.0)]),
    ],
)
def test_group_advantages_by_hand(scale: str, expected: list[float]) -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0, 9.0, 11.0, 10.0], dtype=F64)
    assert group_advantages(rewards, 3, scale, 0.5, alone).tolist() == pytest.approx(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_zero(scale: str) -> None:
    rewards = torch.tensor([0.1] * 7 + [0.3] * 6 + [0.4])
    assert not torch.equal(rewards[:7].mean(), rewards[0])  # the mean of equal floats need not be that float
    advantages = group_advantages(rewards, 7, scale, 1e-4, alone)  # type: ignore[arg-type]
    assert (advantages[:7] == 0).all() and (advantages[7:] != 0).all()
    assert flat_groups(rewards, 7).tolist() == [True, False]


def test_the_deviation_of_the_batch_is_that_of_all_processes() -> None:
    rewards = random_numbers(8, seed=21)
    halves = in_two_processes(lambda rank, total: group_advantages(rewards.chunk(2)[rank], 2, "batch", 0.1, total))
    torch.testing.assert_close(halves, group_advantages(rewards, 2, "batch", 0.1, alone))


def test_the_preference_losses_by_hand() -> None:
    # h = 3 and -1, beta 0.5
    chosen, rejected = torch.tensor([2.0, 0.0], dtype=F64), torch.tensor([-1.0, 1.0], dtype=F64)

    def loss(*rest: object) -> list[float]:
        return preference_loss(chosen, rejected, 0.5, *rest).tolist()  # type: ignore[arg-type]

    right = [math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(0.5))]
    wrong = [math.log(1 + math.exp(1.5)), math.log(1 + math.exp(-0.5))]
    assert loss("sigmoid") == pytest.approx(right)
    assert loss("sigmoid", 0.1) == pytest.approx([0.9 * r + 0.1 * w for r, w in zip(right, wrong, strict=True)])
    assert loss("ipo") == pytest.approx([(3 - 1) ** 2, (-1 - 1) ** 2])


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_descent_raises_the_chosen_ratio_and_lowers_the_rejected_one(kind: str) -> None:
    ratios = torch.zeros(2, requires_grad=True)
    preference_loss(ratios[:1], ratios[1:], 0.1, kind).sum().backward()  # type: ignore[arg-type]
    assert ratios.grad is not None
    # beta / 2 for the logistic loss, 2 / (2 beta) for the square
    size = 0.05 if kind == "sigmoid" else 10.0
    assert ratios.grad.tolist() == pytest.approx([-size, size])
