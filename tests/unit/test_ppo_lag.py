"""PPO-Lag: two streams, the multiplier's arithmetic, and that it keeps a limit PPO breaks."""

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from components.rl.algorithms import build
from components.rl.algorithms.ppo_lag import PPOLag
from components.rl.functional import gae, token_rewards
from components.rl.settings import PPOLagSettings, PPOSettings, RLSettings
from components.rl.types import Forward, Rollout


def alone(tensor: Tensor) -> Tensor:
    return tensor


def rollout(seed: int = 0, **fields: Any) -> Rollout:
    """Three responses of two to four tokens with random numbers of every kind."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.arange(4) < torch.tensor([[4], [2], [3]])
    defaults: dict[str, Any] = {
        "input_ids": torch.zeros(3, 6, dtype=torch.long),
        "attention_mask": torch.cat([torch.ones(3, 2, dtype=torch.bool), mask], 1),
        "mask": mask,
        "logprobs": -numbers(3, 4).abs() * mask,
        "ref_logprobs": -numbers(3, 4).abs() * mask,
        "scores": numbers(3),
        "costs": numbers(3),
        "ended": torch.tensor([True, True, False]),
        "values": numbers(3, 4),
        "cost_values": numbers(3, 4),
    }
    return Rollout(**(defaults | fields))


def ppo_lag(**fields: Any) -> PPOLag:
    settings: dict[str, Any] = {"kl_coef": 0.1, "whiten_advantages": False, "missing_eos": "none"}
    return PPOLag(PPOLagSettings(**(settings | fields)), alone, 16)


def frozen_at(multiplier: float, **fields: Any) -> PPOLag:
    """Its multiplier never moves."""
    return ppo_lag(lambda_init=multiplier, lambda_max=100.0, lambda_delay=10**6, **fields)


@pytest.mark.parametrize("multiplier", [1e-3, 0.5, 1.0, 4.0, 50.0])
def test_the_weight_of_the_kl_does_not_depend_on_lambda(multiplier: float) -> None:
    zeros = torch.zeros(3)
    nothing_but_kl = rollout(
        scores=zeros, costs=zeros, values=torch.zeros(3, 4), cost_values=torch.zeros(3, 4)
    )
    seen = frozen_at(multiplier).targets(nothing_but_kl).advantages
    penalty = 0.1 * (nothing_but_kl.logprobs - nothing_but_kl.ref_logprobs)
    rewards = token_rewards(zeros, penalty, nothing_but_kl.mask)
    expected, _ = gae(rewards, torch.zeros(3, 4), nothing_but_kl.mask, 1.0, 0.95)
    torch.testing.assert_close(seen, expected)
    assert expected.abs().max() > 0.05


@pytest.mark.parametrize("multiplier", [0.25, 3.0])
def test_advantages_combine_as_reward_minus_lambda_times_cost(multiplier: float) -> None:
    given = rollout()
    batch = frozen_at(multiplier, kl_coef=0.0).targets(given)
    assert given.values is not None and given.cost_values is not None and given.costs is not None
    none = torch.zeros(3, 4)
    reward, returns = gae(token_rewards(given.scores, none, given.mask), given.values, given.mask, 1.0, 0.95)
    cost, cost_returns = gae(
        token_rewards(given.costs, none, given.mask), given.cost_values, given.mask, 1.0, 0.95
    )
    torch.testing.assert_close(batch.advantages, (reward - multiplier * cost) / (1 + multiplier))
    torch.testing.assert_close(batch.returns, returns)
    torch.testing.assert_close(batch.cost_returns, cost_returns)


def test_the_multiplier_s_step_by_hand() -> None:
    # log lambda <- log lambda + 0.1 * lambda * (J_C - d)
    algorithm = ppo_lag(lambda_init=2.0, lambda_lr=0.1, cost_limit=0.5)
    metrics = algorithm.update_multiplier(torch.tensor([1.0, 2.0]))
    assert metrics["cost/window_mean"] == 1.5 and metrics["cost/limit"] == 0.5
    assert metrics["cost/lambda"] == algorithm.multiplier.value
    before = math.log(algorithm.multiplier.value)
    assert before == pytest.approx(math.log(2) + 0.1 * 2 * (1.5 - 0.5))
    algorithm.update_multiplier(torch.tensor([-4.0, -3.0]))
    after = math.log(algorithm.multiplier.value)
    assert after == pytest.approx(before + 0.1 * math.exp(before) * (-1.0 - 0.5))


def test_lambda_rises_above_the_limit_falls_below_it_and_stays_positive() -> None:
    for cost, rises in ((1.0, True), (-1.0, False)):
        algorithm = ppo_lag()
        seen = [algorithm.multiplier.value]
        for _ in range(50):
            algorithm.update_multiplier(torch.full((4,), cost))
            seen.append(algorithm.multiplier.value)
        steps = [after - before for before, after in pairwise(seen)]
        assert all(step >= 0 for step in steps) if rises else all(step < 0 for step in steps)
        assert min(seen) > 0


def test_lambda_stops_at_its_upper_bound_and_comes_back() -> None:
    algorithm = ppo_lag(lambda_max=5.0, cost_window=2)
    for _ in range(100):
        algorithm.update_multiplier(torch.full((2,), 10.0))
    assert algorithm.multiplier.value == pytest.approx(5.0)
    algorithm.update_multiplier(torch.full((2,), -1.0))
    assert algorithm.multiplier.value < 5.0


def test_the_mean_cost_is_over_the_window_of_latest_responses() -> None:
    algorithm = ppo_lag(cost_window=3)
    assert algorithm.update_multiplier(torch.tensor([9.0, 1.0]))["cost/window_mean"] == 5.0
    assert algorithm.update_multiplier(torch.tensor([2.0, 3.0]))["cost/window_mean"] == pytest.approx((1 + 2 + 3) / 3)


def test_the_mean_cost_is_weighted_by_count_over_processes() -> None:
    other = torch.tensor([3.0, 30.0, 310.0])  # another process holds three costs that sum to 30, their squares to 310
    algorithm = PPOLag(PPOLagSettings(), lambda tensor: tensor + other, 16)
    assert algorithm.update_multiplier(torch.tensor([2.0]))["cost/window_mean"] == pytest.approx(32 / 4)


def test_the_multiplier_waits_out_its_delay() -> None:
    algorithm = ppo_lag(lambda_delay=2)
    seen = []
    for _ in range(4):
        algorithm.targets(rollout(costs=torch.ones(3)))
        seen.append(algorithm.multiplier.value)
    assert seen[0] == seen[1] == 1.0 < seen[2] < seen[3]


def test_the_multiplier_moves_before_the_advantages_are_combined() -> None:
    algorithm = ppo_lag(lambda_lr=1.0)
    batch = algorithm.targets(rollout(costs=torch.ones(3)))
    assert batch.metrics["cost/lambda"] == algorithm.multiplier.value == pytest.approx(math.e)
    assert batch.metrics["cost/window_mean"] == 1.0
    torch.testing.assert_close(
        batch.advantages, frozen_at(math.e).targets(rollout(costs=torch.ones(3))).advantages
    )


def test_costs_are_clamped_in_the_stream_and_not_in_the_mean() -> None:
    algorithm = frozen_at(1.0, kl_coef=0.0, score_clip=2.0)
    batch = algorithm.targets(rollout(costs=torch.tensor([50.0, -50.0, 1.0]), cost_values=torch.zeros(3, 4)))
    assert batch.cost_returns is not None
    ends = batch.cost_returns[torch.arange(3), torch.tensor([3, 1, 2])]
    assert ends.tolist() == pytest.approx([2, -2, 1])
    assert batch.metrics["cost/window_mean"] == pytest.approx(1 / 3)


def test_the_share_of_unsafe_responses_can_take_the_place_of_the_cost() -> None:
    costs = torch.tensor([0.3, -5.0, 7.0])
    shares = frozen_at(2.0, constrain="unsafe", cost_limit=0.5).targets(rollout(costs=costs))
    same = frozen_at(2.0).targets(rollout(costs=torch.tensor([1.0, 0.0, 1.0])))
    torch.testing.assert_close(shares.advantages, same.advantages)
    assert shares.metrics["cost/window_mean"] == pytest.approx(2 / 3)
    boundary = frozen_at(2.0, constrain="unsafe", cost_limit=0.5).targets(rollout(costs=torch.tensor([0.0, -0.5, 0.1])))
    assert boundary.metrics["cost/window_mean"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match=r"cost_limit is 0\.0 and constrain is unsafe; accepted: a share above 0"):
        PPOLagSettings(constrain="unsafe")


def test_a_missing_end_lowers_the_reward_and_not_the_cost() -> None:
    without, with_rule = (frozen_at(1.0, missing_eos=rule).targets(rollout()) for rule in ("none", "penalty"))
    assert with_rule.returns is not None and without.returns is not None
    assert ((without.returns - with_rule.returns)[:, 0].abs() > 0.1).tolist() == [False, False, True]
    assert torch.equal(without.cost_returns, with_rule.cost_returns)  # type: ignore[arg-type]


def test_state_survives_json_and_continues_exactly() -> None:
    first, second = (ppo_lag(cost_window=8, kl_target=0.1, kl_horizon=20) for _ in range(2))
    for seed in range(2):
        first.targets(rollout(seed))
    second.targets(rollout(7))  # all of it is to be forgotten
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    assert torch.equal(first.targets(rollout(9)).advantages, second.targets(rollout(9)).advantages)
    assert second.multiplier.value == first.multiplier.value != 1.0
    assert second.kl.coef == first.kl.coef != 0.1


def test_no_gradient_reaches_the_multiplier_or_the_targets() -> None:
    algorithm = ppo_lag()
    batch = algorithm.targets(rollout())
    state = algorithm.state_dict()
    logprobs, values, cost_values = (torch.randn(3, 4).requires_grad_() for _ in range(3))
    total, means = algorithm.loss(batch, Forward(logprobs, torch.ones(3, 4), values, cost_values))
    total.backward()
    assert isinstance(algorithm.multiplier.value, float) and algorithm.state_dict() == state
    assert not any(t.requires_grad for t in vars(batch).values() if isinstance(t, Tensor))
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (logprobs, values, cost_values))
    assert all(isinstance(number, float) for mean in means.values() for number in mean)


def test_the_cost_critic_has_a_loss_of_its_own_around_the_rollout_s_values() -> None:
    algorithm = ppo_lag(value_clip=0.2, value_coef=2.0)
    batch = algorithm.targets(rollout())
    assert batch.cost_values is not None and batch.cost_returns is not None
    still = Forward(batch.logprobs, torch.zeros(3, 4), batch.values, batch.cost_values)
    perfect = still._replace(cost_values=batch.cost_returns)
    (before, means), (after, moved) = (algorithm.loss(batch, forward) for forward in (still, perfect))
    gaps = (batch.cost_returns - batch.cost_values)[batch.mask].abs()
    assert means["loss/cost_value"] == pytest.approx((gaps.square().sum().item() / 2, 9), rel=1e-4)
    clipped = (gaps - 0.2).clamp(min=0).square().sum().item() / 2
    assert moved["loss/cost_value"] == pytest.approx((clipped, 9), rel=1e-4)
    assert (before - after).item() == pytest.approx(
        2 * (means["loss/cost_value"][0] - moved["loss/cost_value"][0]), rel=1e-3
    )
    assert means["loss/value"] == moved["loss/value"]


def test_targets_by_hand() -> None:
    # One response of two tokens; k1 0.5 and -1, coefficient 0.1: penalties 0.05, -0.1.
    # Rewards -0.05, 0.1 + 2; costs 0.05, -0.1 - 1. With gamma = lam = 1: returns 2.05, 2.1 and -1.05, -1.1;
    # advantages 1.05, 1.6 and -1.05, -2.1; combined (A - 3 C) / 4.
    given = Rollout(
        input_ids=torch.zeros(1, 3).long(),
        attention_mask=torch.ones(1, 3).bool(),
        mask=torch.ones(1, 2).bool(),
        logprobs=torch.tensor([[-1.0, -2.0]]),
        ref_logprobs=torch.tensor([[-1.5, -1.0]]),
        scores=torch.tensor([2.0]),
        costs=torch.tensor([-1.0]),
        ended=torch.tensor([True]),
        values=torch.tensor([[1.0, 0.5]]),
        cost_values=torch.tensor([[0.0, 1.0]]),
    )
    batch = frozen_at(3.0, lam=1.0).targets(given)
    assert batch.advantages is not None and batch.returns is not None and batch.cost_returns is not None
    assert batch.advantages[0].tolist() == pytest.approx([(1.05 + 3 * 1.05) / 4, (1.6 + 3 * 2.1) / 4])
    assert batch.returns[0].tolist() == pytest.approx([2.05, 2.1])
    assert batch.cost_returns[0].tolist() == pytest.approx([-1.05, -1.1])
    assert torch.equal(batch.cost_values, given.cost_values)  # type: ignore[arg-type]
    assert batch.metrics == pytest.approx({
        "policy/kl_coef": 0.1, "value/value_explained": 1 - 0.275**2 / 0.025**2, "value/value_mean": 0.75,
        "value/cost_value_explained": 1 - 0.525**2 / 0.025**2, "value/cost_value_mean": 0.5,
        "cost/lambda": 3.0, "cost/limit": 0.0, "cost/window_mean": -1.0, "cost/window_low": -1.0,
        "cost/window_high": -1.0,
    }, rel=1e-3)  # fmt: skip


def test_whitening_follows_the_combination() -> None:
    batch, plain = (frozen_at(2.0, whiten_advantages=on).targets(rollout()) for on in (True, False))
    assert batch.advantages is not None and plain.advantages is not None
    told = plain.advantages[plain.mask]
    torch.testing.assert_close(batch.advantages[batch.mask], (told - told.mean()) / told.std(unbiased=False))


def test_the_pid_controller_moves_lambda_where_the_settings_name_it() -> None:
    algorithm = ppo_lag(multiplier="pid", pid={"kp": 0.5, "ki": 0.25, "kd": 0.0, "smoothing": 0.0})
    metrics = algorithm.targets(rollout(costs=torch.full((3,), 2.0))).metrics
    assert metrics["cost/lambda"] == pytest.approx(1 + 0.25 * 2 + 0.5 * 2)
    other = ppo_lag(multiplier="pid", pid={"kp": 0.5, "ki": 0.25, "kd": 0.0, "smoothing": 0.0})
    other.load_state_dict(json.loads(json.dumps(algorithm.state_dict())))
    assert algorithm.targets(rollout(5)).metrics == other.targets(rollout(5)).metrics


@pytest.mark.parametrize(("normalization", "terms"), [("token", 9), ("sequence", 3), ("constant", 3 * 16)])
def test_the_cost_critic_s_loss_is_normalised_as_the_others_are(normalization: str, terms: int) -> None:
    algorithm = frozen_at(1.0, normalization=normalization)
    batch = algorithm.targets(rollout())
    assert batch.cost_values is not None and batch.cost_returns is not None
    _, means = algorithm.loss(batch, Forward(batch.logprobs, torch.zeros(3, 4), batch.values, batch.cost_values))
    squares = ((batch.cost_returns - batch.cost_values) ** 2 / 2).masked_fill(~batch.mask, 0)
    share = torch.tensor([4.0, 2.0, 3.0]) if normalization == "sequence" else torch.ones(3)
    assert means["loss/cost_value"] == pytest.approx(((squares.sum(1) / share).sum().item(), terms), rel=1e-5)


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
@pytest.mark.parametrize("micro", [1, 5])
def test_micro_batches_change_no_gradient_and_no_mean(
    normalization: str, micro: int, random_rollout: Any, update_gradient: Any
) -> None:
    algorithm = ppo_lag(entropy_coef=0.1, normalization=normalization)
    batch = algorithm.targets(random_rollout(12))
    (whole, means), (cut, cut_means) = (update_gradient(algorithm, batch, size) for size in (100, micro))
    torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-5)
    assert cut_means == pytest.approx(means, rel=1e-5)
    assert all(part.abs().sum() > 0 for part in whole)


def test_ppo_lag_is_what_its_settings_name_and_needs_a_cost_model() -> None:
    settings = RLSettings(algorithm={"name": "ppo_lag"})  # type: ignore[arg-type]
    assert type(build(settings.algorithm, alone, 16)) is PPOLag and settings.teachers == ("reward", "cost")
    assert RLSettings(algorithm=PPOSettings()).teachers == ("reward",)


REWARDS, COSTS = {"a": 1.0, "b": 0.7}, {"a": 1.0, "b": -1.0, "c": -1.0, "d": -1.0}
"""The best word is unsafe; the next best is not."""


def test_ppo_lag_learns_the_best_word_that_is_safe_where_ppo_learns_the_unsafe_one(
    bandit: Any, word_scorer: Any
) -> None:
    limited = PPOLagSettings(kl_coef=0.0, lambda_lr=0.5, cost_limit=-0.7, cost_window=64)
    safe = bandit.learn(bandit.settings(limited), word_scorer(REWARDS), word_scorer(COSTS))
    unsafe = bandit.learn(bandit.settings(PPOSettings(kl_coef=0.0)), word_scorer(REWARDS))
    assert unsafe["p/a"] > 0.6 > unsafe["p/b"]
    assert safe["p/b"] > 0.6 and safe["p/a"] < 0.25
    assert safe["rollout/cost"] < -0.4
    assert safe["cost/lambda"] > 0


def test_a_sign_error_in_the_cost_breaks_it(bandit: Any, word_scorer: Any) -> None:
    limited = PPOLagSettings(kl_coef=0.0, lambda_lr=0.5, cost_limit=-0.7, cost_window=64)
    learned = bandit.learn(bandit.settings(limited), word_scorer(REWARDS), word_scorer(COSTS, sign=-1.0))
    assert learned["p/a"] > 0.6 > learned["p/b"]
