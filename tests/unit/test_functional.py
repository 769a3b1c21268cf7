"""The mathematics of reinforcement learning, against hand arithmetic, enumeration and brute force."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from components.divergence import kl_estimate
from components.rl.functional import (
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    last_token,
    masked_mean,
    masked_sum,
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


def test_whitening_over_two_processes_equals_whitening_their_rows_together() -> None:
    values, mask = random_numbers(8, 5, seed=5), random_mask(8, 5, seed=6)
    slots: list[Tensor] = [torch.zeros(())] * 2
    barrier = threading.Barrier(2, timeout=10)

    def process(rank: int) -> Tensor:
        def total(tensor: Tensor) -> Tensor:
            slots[rank] = tensor
            barrier.wait()
            both = slots[0] + slots[1]
            barrier.wait()
            return both

        return whiten(values.chunk(2)[rank], mask.chunk(2)[rank], total)

    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(process, range(2)))
    torch.testing.assert_close(torch.cat(halves), whiten(values, mask, alone))


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
    # Value 1, return 0: max(1, 0.04) = 1.
    # Value 0.1, return 1: 0.81 both ways. Half of 5.05.
    values, returns = torch.tensor([[1.0, 1.0, 0.1, 5.0]]), torch.tensor([[2.0, 0.0, 1.0, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    loss = clipped_value_loss(values, torch.zeros(1, 4), returns, mask, 0.2)
    assert loss.item() == pytest.approx((3.24 + 1 + 0.81) / 2)
