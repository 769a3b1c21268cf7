"""PPO: targets by hand, the missing-EOS rules, and that it learns."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from components.rl.algorithms import build
from components.rl.algorithms.ppo import PPO
from components.rl.settings import PPOSettings, RLSettings
from components.rl.types import Batch, Forward, Rollout


def alone(tensor: Tensor) -> Tensor:
    return tensor


def rollout(**fields: Any) -> Rollout:
    """Two responses, of three tokens and of two, the second cut before it ended."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    defaults: dict[str, Any] = {
        "input_ids": torch.arange(8).reshape(2, 4),
        "attention_mask": torch.cat([torch.ones(2, 1, dtype=torch.bool), mask], 1),
        "mask": mask,
        "logprobs": torch.tensor([[-1.0, -2.0, -1.0], [-1.0, -1.0, 0.0]]),
        "ref_logprobs": torch.tensor([[-1.5, -1.0, -1.0], [-3.0, -1.0, 0.0]]),
        "scores": torch.tensor([2.0, -1.0]),
        "ended": torch.tensor([True, False]),
        "values": torch.tensor([[0.5, 0.25, 1.0], [0.0, 1.0, 9.0]]),
    }
    return Rollout(**(defaults | fields))


def ppo(**fields: Any) -> PPO:
    settings: dict[str, Any] = {"kl_coef": 0.1, "lam": 1.0, "whiten_advantages": False, "missing_eos": "none"}
    return PPO(PPOSettings(**(settings | fields)), alone, 16)


def forward_of(batch: Batch, **fields: Any) -> Forward:
    """What the models say before their first update."""
    return Forward(
        **(
            {"logprobs": batch.logprobs, "entropy": torch.ones_like(batch.logprobs), "values": batch.values}
            | fields
        )
    )


def test_targets_by_hand() -> None:
    # k1 = logprobs - ref: [0.5, -1, 0], [2, 0]; rewards [-0.05, 0.1, 2], [-0.2, -1].
    # With gamma = lam = 1 the return is the sum of the rewards to come, the advantage what the value lacks.
    batch = ppo().targets(rollout())
    returns = torch.tensor([[2.05, 2.1, 2.0], [-1.2, -1.0, 0.0]])
    advantages = torch.tensor([[1.55, 1.85, 1.0], [-1.2, -2.0, 0.0]])
    torch.testing.assert_close(batch.returns, returns)
    torch.testing.assert_close(batch.advantages, advantages)
    assert batch.unit == 1 and len(batch) == 2


def test_whitened_advantages_have_mean_zero_over_response_tokens() -> None:
    batch = ppo(whiten_advantages=True).targets(rollout())
    plain = ppo().targets(rollout())
    assert batch.advantages[batch.mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert batch.advantages[batch.mask].std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert batch.returns is not None and torch.equal(batch.returns, plain.returns)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "expected"), [("none", [2.0, -1.0]), ("penalty", [2.0, -1.5]), ("replace", [2.0, -0.5])]
)
def test_a_response_that_did_not_end_is_scored_by_the_rule(rule: str, expected: list[float]) -> None:
    batch = ppo(kl_coef=0.0, missing_eos=rule, missing_eos_penalty=0.5).targets(rollout())
    assert batch.returns is not None
    assert batch.returns[:, 0].tolist() == pytest.approx(expected)


def test_the_score_is_clamped_and_the_kl_is_not() -> None:
    far = rollout(
        scores=torch.tensor([100.0, -100.0]),
        ref_logprobs=torch.tensor([[-11.0, -2.0, -1.0], [-1.0, -1.0, 0.0]]),
    )
    batch = ppo(kl_coef=2.0, score_clip=5.0).targets(far)  # KL 10 at the first token costs 20
    assert batch.returns is not None
    assert batch.returns[:, 0].tolist() == pytest.approx([5 - 20, -5])


def test_k3_inside_the_reward_is_never_a_bonus() -> None:
    neutral = rollout(scores=torch.zeros(2))
    k1, k3 = (ppo(kl_estimator=name).targets(neutral).returns for name in ("k1", "k3"))
    assert k1 is not None and k3 is not None
    assert k1[0, 1] > 0  # the second token is less likely than under the reference
    assert (k3[neutral.mask] <= 0).all()


def test_before_the_first_update_nothing_is_clipped_and_the_loss_is_minus_the_advantages() -> None:
    algorithm = ppo()
    batch = algorithm.targets(rollout())
    total, means = algorithm.loss(batch, forward_of(batch))
    assert means["policy/clip_fraction"] == (0, 5) and means["policy/approx_kl"] == (0, 5)
    assert means["policy/ratio"] == (5, 5) and algorithm.terms(batch) == 5
    assert means["loss/policy"] == pytest.approx((-(1.55 + 1.85 + 1.0 - 1.2 - 2.0), 5))
    # Half the squared errors of the old values, which are the advantages here
    assert means["loss/value"] == pytest.approx(((1.55**2 + 1.85**2 + 1 + 1.2**2 + 2**2) / 2, 5), rel=1e-5)
    assert total.item() == pytest.approx(means["loss/policy"][0] + 0.5 * means["loss/value"][0], rel=1e-5)
    assert means["policy/entropy"] == (5, 5)


def test_values_are_clipped_around_those_of_the_rollout() -> None:
    algorithm = ppo(value_clip=0.2)
    batch = algorithm.targets(rollout())
    assert batch.values is not None and batch.returns is not None
    moved = forward_of(batch, values=batch.returns)  # a perfect critic, far from the old one
    _, means = algorithm.loss(batch, moved)
    gaps = (batch.returns - batch.values)[batch.mask].abs() - 0.2
    assert means["loss/value"] == pytest.approx((gaps.square().sum().item() / 2, 5), rel=1e-5)


def test_rows_of_other_order_have_the_targets_of_their_own() -> None:
    first, flipped = rollout(), rollout()
    tensors = {name: value.flip(0) for name, value in vars(flipped).items() if isinstance(value, Tensor)}
    batches = [ppo(whiten_advantages=True).targets(given) for given in (first, replace(flipped, **tensors))]
    torch.testing.assert_close(batches[0].advantages, batches[1].advantages.flip(0))


def test_the_explained_variance_of_a_perfect_critic_is_one() -> None:
    returns = ppo().targets(rollout()).returns
    assert ppo().targets(rollout(values=returns)).metrics["value/value_explained"] == pytest.approx(1)
    assert ppo().targets(rollout()).metrics["value/value_explained"] < 0.9


def test_discount_and_lambda_reach_the_advantages() -> None:
    # Second row, kl_coef 0: rewards 0, -1; values 0, 1. Deltas 0 + 0.5 * 1 - 0 and -1 - 1, discounted by 0.5 * 0.8.
    batch = ppo(kl_coef=0.0, gamma=0.5, lam=0.8).targets(rollout())
    assert batch.advantages is not None and batch.returns is not None
    assert batch.advantages[1].tolist() == pytest.approx([0.5 - 2 * 0.4, -2, 0])
    assert batch.returns[1].tolist() == pytest.approx([0.5 - 2 * 0.4, -1, 0])


def test_whitened_rewards_keep_their_mean_and_are_scaled_before_the_advantages() -> None:
    # Rewards -0.05, 0.1, 2, -0.2, -1: mean 0.17
    rewards = torch.tensor([-0.05, 0.1, 2.0, -0.2, -1.0])
    scaled = (rewards - 0.17) / rewards.std(unbiased=False) + 0.17
    batch = ppo(whiten_rewards=True).targets(rollout())
    assert batch.returns is not None
    expected = [scaled[0] + scaled[1] + scaled[2], scaled[1] + scaled[2], scaled[2], scaled[3] + scaled[4], scaled[4]]
    assert batch.returns[batch.mask].tolist() == pytest.approx([x.item() for x in expected], rel=1e-4)


def test_the_critic_s_metrics_by_hand() -> None:
    # Returns 2.05, 2.1, 2, -1.2, -1; values 0.5, 0.25, 1, 0, 1; errors 1.55, 1.85, 1, -1.2, -2
    metrics = ppo().targets(rollout()).metrics
    errors, returns = torch.tensor([1.55, 1.85, 1.0, -1.2, -2.0]), torch.tensor([2.05, 2.1, 2.0, -1.2, -1.0])
    explained = 1 - (errors.square().mean() - errors.mean() ** 2) / (returns.square().mean() - returns.mean() ** 2)
    assert metrics["value/value_explained"] == pytest.approx(explained.item(), rel=1e-4)
    assert metrics["value/value_mean"] == pytest.approx(2.75 / 5)
    assert metrics["policy/kl_coef"] == 0.1


def test_equal_returns_are_explained_by_equal_values_alone() -> None:
    # All returns are 1 under gamma 1 with a score of 1 and no KL: the variance to explain is 0
    flat = rollout(scores=torch.ones(2), values=torch.full((2, 3), 5.0))
    assert ppo(kl_coef=0.0).targets(flat).metrics["value/value_explained"] == 1.0
    # Values 0.5, 0.25, 1, 0, 1: the variance of the errors is theirs, over 1e-8
    varied = ppo(kl_coef=0.0).targets(rollout(scores=torch.ones(2))).metrics["value/value_explained"]
    assert varied == pytest.approx(1 - ((0.25 + 0.0625 + 1 + 1) / 5 - 0.55**2) / 1e-8, rel=1e-3)


# Ratios 1.5, 0.5, 5 | 1.5, 1 with advantages 1, -1, -2 | 2, 0.5 and clip 0.2:
# 1.2 (clipped), -0.8 (clipped), -10 | 2.4 (clipped), 0.5
OBJECTIVE = [[1.2, -0.8, -10.0], [2.4, 0.5]]
# Values 1, 0.1, 0 | 2, 0 around 0, returns 2, 1, 0 | 0, 3 and clip 0.2, half the larger square of:
# (1 - 2, 0.2 - 2), (0.1 - 1), 0 | (2, 0.2), (-3)
VALUE = [[1.8**2 / 2, 0.9**2 / 2, 0.0], [2**2 / 2, 3**2 / 2]]


def by_hand(normalization: str, rows: list[list[float]]) -> float:
    """The sum over tokens, or over responses of their mean."""
    return sum(sum(row) / (len(row) if normalization == "sequence" else 1) for row in rows)


def learned_from() -> tuple[Batch, Forward]:
    """A batch, and what moved networks say of it. Outside the mask are numbers that must not count."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    batch = Batch(
        torch.zeros(2, 4).long(),
        torch.ones(2, 4).bool(),
        mask,
        logprobs=torch.full((2, 3), -1.0),
        advantages=torch.tensor([[1.0, -1.0, -2.0], [2.0, 0.5, 9.0]]),
        returns=torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 9.0]]),
        values=torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -9.0]]),
    )
    ratios = torch.tensor([[1.5, 0.5, 5.0], [1.5, 1.0, 9.0]])
    values = torch.tensor([[1.0, 0.1, 0.0], [2.0, 0.0, 9.0]])
    return batch, Forward(ratios.log() - 1, torch.full((2, 3), 2.0), values)


@pytest.mark.parametrize(("normalization", "terms"), [("token", 5), ("sequence", 2), ("constant", 2 * 16)])
def test_the_loss_by_hand(normalization: str, terms: int) -> None:
    algorithm = ppo(normalization=normalization, entropy_coef=0.25, value_coef=0.7)
    batch, forward = learned_from()
    total, means = algorithm.loss(batch, forward)
    policy, value = -by_hand(normalization, OBJECTIVE), by_hand(normalization, VALUE)
    entropy = by_hand(normalization, [[2.0] * 3, [2.0] * 2])
    assert algorithm.terms(batch) == terms
    assert means["loss/policy"] == pytest.approx((policy, terms), rel=1e-5)
    assert means["loss/value"] == pytest.approx((value, terms), rel=1e-5)
    assert total.item() == pytest.approx(policy - 0.25 * entropy + 0.7 * value, rel=1e-5)
    ratios = (1.5, 0.5, 5, 1.5, 1)
    assert means["policy/ratio"] == pytest.approx((sum(ratios), 5), rel=1e-5)
    assert means["policy/approx_kl"] == pytest.approx((sum(r - 1 - math.log(r) for r in ratios), 5), rel=1e-5)
    assert means["policy/clip_fraction"] == (3, 5)
    assert means["policy/entropy"] == (10, 5)


def test_clip_clip_higher_dual_clip_and_the_constant_reach_the_loss() -> None:
    batch, forward = learned_from()

    def objective(**fields: Any) -> float:
        return -ppo(**fields).loss(batch, forward)[1]["loss/policy"][0]

    plain = by_hand("token", OBJECTIVE)
    assert objective() == pytest.approx(plain, rel=1e-5)
    assert objective(clip=0.4) == pytest.approx(plain + 0.2 + 0.2 + 0.4, rel=1e-5)
    assert objective(clip_high=0.4) == pytest.approx(plain + 0.2 + 0.4, rel=1e-5)
    assert objective(dual_clip=3.0) == pytest.approx(plain + 4, rel=1e-5)  # -6 for -10
    assert ppo(normalization="constant", normalization_constant=7).terms(batch) == 14


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
@pytest.mark.parametrize("micro", [1, 5])
def test_micro_batches_change_no_gradient_and_no_mean(
    normalization: str, micro: int, random_rollout: Any, update_gradient: Any
) -> None:
    algorithm = ppo(entropy_coef=0.1, normalization=normalization)
    batch = algorithm.targets(random_rollout(12))
    (whole, means), (cut, cut_means) = (update_gradient(algorithm, batch, size) for size in (100, micro))
    torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-5)
    assert cut_means == pytest.approx(means, rel=1e-5)
    assert all(part.abs().sum() > 0 for part in whole[:3]) and whole[3].abs().sum() == 0


def test_the_coefficient_moves_before_it_is_used_and_survives_json() -> None:
    # k1 is -0.5 and 2 nats, 0.75 per response: far above the target, so 0.1 * (1 + 0.2 * 2 / 4)
    first = ppo(kl_target=0.1, kl_horizon=4)
    batch = first.targets(rollout())
    assert batch.metrics["policy/kl_coef"] == pytest.approx(0.11)
    assert batch.returns is not None
    assert batch.returns[:, 0].tolist() == pytest.approx([2 + 0.11 * 0.5, -1 - 0.11 * 2])
    second = ppo(kl_target=0.1, kl_horizon=4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    again = [algorithm.targets(rollout()).returns for algorithm in (first, second)]
    assert again[0] is not None and again[1] is not None and torch.equal(*again)
    assert second.state_dict() == first.state_dict() == {"kl_coef": pytest.approx(0.121)}


def test_ppo_is_what_its_settings_name_and_keeps_nothing_but_the_kl_coefficient() -> None:
    algorithm = build(RLSettings(algorithm={"name": "ppo", "kl_coef": 0.3}).algorithm, alone, 16)  # type: ignore[arg-type]
    assert type(algorithm) is PPO and algorithm.state_dict() == {"kl_coef": 0.3}
    assert algorithm.group_size == algorithm.rows_per_prompt == 1


@pytest.mark.parametrize("epochs", [1, 2])
def test_ppo_learns_to_say_the_word_that_scores(bandit: Any, word_scorer: Any, epochs: int) -> None:
    settings = bandit.settings(PPOSettings(kl_coef=0.0), epochs=epochs)
    learned = bandit.learn(settings, word_scorer({"a": 1.0}))
    assert learned["p/a"] > 0.7
    assert learned["policy/first_ratio_gap"] < 1e-5
    assert learned["loss/skipped_updates"] == 0


def test_a_sign_error_breaks_it(bandit: Any, word_scorer: Any) -> None:
    learned = bandit.learn(bandit.settings(PPOSettings(kl_coef=0.0)), word_scorer({"a": 1.0}, sign=-1.0))
    assert learned["p/a"] < 0.02


def test_the_kl_penalty_holds_the_policy_back(bandit: Any, word_scorer: Any) -> None:
    free, held = (
        bandit.learn(bandit.settings(PPOSettings(kl_coef=kl_coef)), word_scorer({"a": 1.0}))
        for kl_coef in (0.0, 1.0)
    )
    assert held["rollout/kl_k3"] < free["rollout/kl_k3"] / 3
    assert held["p/a"] < free["p/a"]
