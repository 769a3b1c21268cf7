"""PPO: targets by hand, the missing-EOS rules, and that it learns."""

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
