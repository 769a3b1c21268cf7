"""RLOO: rewards, baselines and the ratio of whole responses by hand, and that it learns."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from components.rl.algorithm_settings import RLOOSettings
from components.rl.algorithms import build
from components.rl.algorithms.rloo import RLOO
from components.rl.types import Batch, Forward, Rollout

LENGTHS = torch.tensor([[3], [2], [1], [3]])


def alone(tensor: Tensor) -> Tensor:
    return tensor


def rollout(**fields: Any) -> Rollout:
    """Two prompts, two responses each; the third response was cut. Outside the mask are numbers that must not count."""
    mask = torch.arange(3) < LENGTHS
    defaults: dict[str, Any] = {
        "input_ids": torch.arange(20).reshape(4, 5),
        "attention_mask": torch.cat([torch.ones(4, 2, dtype=torch.bool), mask], 1),
        "mask": mask,
        "logprobs": torch.tensor([[-1.0, -2.0, -1.0], [-1.0, -1.0, 8.0], [-0.5, 8.0, 8.0], [-2.0, -1.0, -1.0]]),
        "ref_logprobs": torch.tensor([[-1.5, -1.0, -1.0], [-3.0, -1.0, 3.0], [-1.5, 3.0, 3.0], [-2.0, -1.0, -1.0]]),
        "scores": torch.tensor([1.0, 3.0, 9.0, 9.5]),
        "ended": torch.tensor([True, True, False, True]),
        "group_size": 2,
    }
    return Rollout(**(defaults | fields))


def rloo(**fields: Any) -> RLOO:
    settings: dict[str, Any] = {"kl_coef": 0.1, "group_size": 2, "missing_eos": "none"}
    return RLOO(RLOOSettings(**(settings | fields)), alone)


def advantages(algorithm: RLOO, given: Rollout) -> list[float]:
    found = algorithm.targets(given).advantages
    assert found is not None
    return found.tolist()  # type: ignore[no-any-return]


def forward_of(batch: Batch, *log_ratios: list[float]) -> Forward:
    """Log-probabilities that far from the old ones, and an entropy of 2 per token."""
    assert batch.logprobs is not None
    return Forward(batch.logprobs + torch.tensor(log_ratios), torch.full_like(batch.logprobs, 2.0))


def test_targets_by_hand() -> None:
    # k1 per response: 0.5 - 1 + 0, 2 + 0, 1, 0; rewards 1.05, 2.8, 8.9, 9.5
    batch = rloo().targets(rollout())
    assert batch.advantages is not None and batch.advantages.shape == (4,)
    assert batch.advantages.tolist() == pytest.approx([-1.75, 1.75, -0.6, 0.6])
    assert batch.metrics["policy/advantage_std"] == pytest.approx(math.sqrt((2 * 1.75**2 + 2 * 0.6**2) / 4))
    assert batch.metrics["policy/kl_coef"] == 0.1
    assert (batch.unit, len(batch)) == (1, 4)


def test_the_kl_estimator_inside_the_reward_is_the_named_one() -> None:
    k3 = [sum(math.exp(d) - d - 1 for d in ds) for ds in ([-0.5, 1, 0], [-2, 0], [-1], [0])]
    rewards = [score - 0.1 * kl for score, kl in zip((1.0, 3.0, 9.0, 9.5), k3, strict=True)]
    expected = [rewards[0] - rewards[1], rewards[1] - rewards[0], rewards[2] - rewards[3], rewards[3] - rewards[2]]
    assert advantages(rloo(kl_estimator="k3"), rollout()) == pytest.approx(expected, rel=1e-5)


def test_whitened_advantages_have_deviation_one() -> None:
    std = math.sqrt((2 * 1.75**2 + 2 * 0.6**2) / 4)
    batch = rloo(whiten_advantages=True).targets(rollout())
    assert batch.advantages is not None
    assert batch.advantages.tolist() == pytest.approx([x / std for x in (-1.75, 1.75, -0.6, 0.6)])
    assert batch.metrics["policy/advantage_std"] == pytest.approx(std)  # before it was made 1


@pytest.mark.parametrize(("rule", "expected"), [("none", 9.0), ("penalty", 8.5), ("replace", -0.5)])
def test_a_response_that_did_not_end_is_scored_by_the_rule(rule: str, expected: float) -> None:
    found = advantages(rloo(kl_coef=0.0, missing_eos=rule, missing_eos_penalty=0.5), rollout())
    assert found == pytest.approx([-2, 2, expected - 9.5, 9.5 - expected])


def test_scores_are_clamped_after_the_rule_and_the_kl_is_not() -> None:
    far = rollout(scores=torch.tensor([100.0, -100.0, 100.0, 0.0]))
    assert advantages(rloo(kl_coef=0.0, score_clip=4.0), far) == pytest.approx([8, -8, 4, -4])
    assert advantages(rloo(kl_coef=0.0, score_clip=4.0, missing_eos="penalty"), far)[2] == pytest.approx(4)
    costly = advantages(rloo(kl_coef=20.0, score_clip=4.0), rollout(scores=torch.zeros(4)))
    assert costly == pytest.approx([10 + 40, -50, -20, 20])


@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_the_other_prompts_never_matter(group_size: int, random_rollout: Any) -> None:
    given = random_rollout(3, group_size)
    owners = 100.0 * torch.arange(3).repeat_interleave(group_size)  # scores that tell whose they are
    settings = {"group_size": group_size, "score_clip": 1000.0}
    plain = advantages(rloo(**settings), given)
    marked = advantages(rloo(**settings), rollout(**(vars(given) | {"scores": given.scores + owners})))
    assert marked == pytest.approx(plain, abs=1e-4)
    assert max(map(abs, plain)) > 0.5


def test_the_loss_by_hand_with_the_ratio_of_whole_responses() -> None:
    # Ratios 1.5, 1.5, 0.5, 1.1; clip 0.2; advantages -1.75, 1.75, -0.6, 0.6:
    # -2.625, 1.2 * 1.75 = 2.1 clipped, 0.8 * -0.6 = -0.48 clipped, 0.66. Single tokens of the last change threefold.
    algorithm = rloo(entropy_coef=0.1)
    batch = algorithm.targets(rollout())
    log = math.log
    forward = forward_of(
        batch, [log(1.5), 0, 0], [log(3), -log(2), 50], [-log(2), 50, 50], [log(3), -log(3), log(1.1)]
    )
    total, means = algorithm.loss(batch, forward)
    loss = 2.625 - 2.1 + 0.48 - 0.66
    assert means["loss/policy"] == pytest.approx((loss, 4), rel=1e-5)
    assert total.item() == pytest.approx(loss - 0.1 * 2 * 9, rel=1e-5)
    ratios = (1.5, 1.5, 0.5, 1.1)
    assert means["policy/ratio"] == pytest.approx((sum(ratios), 4), rel=1e-5)
    assert means["policy/approx_kl"] == pytest.approx((sum(r - 1 - log(r) for r in ratios), 4), rel=1e-4)
    assert means["policy/clip_fraction"] == (2, 4)
    assert means["policy/entropy"] == (18, 9)
    assert algorithm.terms(batch) == 4


def test_the_first_gradient_is_the_advantage_at_every_token() -> None:
    algorithm = rloo()
    batch = algorithm.targets(rollout())
    assert batch.logprobs is not None
    logprobs = batch.logprobs.clone().requires_grad_()
    algorithm.loss(batch, Forward(logprobs, torch.zeros(4, 3)))[0].backward()
    assert logprobs.grad is not None
    expected = -torch.tensor([-1.75, 1.75, -0.6, 0.6])[:, None] * batch.mask
    torch.testing.assert_close(logprobs.grad, expected)


def test_the_advantages_of_every_minibatch_cancel(random_rollout: Any) -> None:
    batch = rloo(group_size=4, kl_coef=0.0).targets(random_rollout(6, 4))
    for rows in batch.plan(1, 8, seed=0):
        part = batch.rows(rows).advantages
        assert part is not None and len(part) == 8
        assert part.sum().item() == pytest.approx(0, abs=1e-5) and part.abs().sum() > 0.1


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_change_no_gradient_and_no_mean(micro: int, random_rollout: Any, update_gradient: Any) -> None:
    algorithm = rloo(group_size=4, entropy_coef=0.1)
    batch = algorithm.targets(random_rollout(3, 4))
    (whole, means), (cut, cut_means) = (update_gradient(algorithm, batch, size) for size in (100, micro))
    torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-5)
    assert cut_means == pytest.approx(means, rel=1e-5)
    assert whole[:2].abs().sum() > 0 and whole[2:].abs().sum() == 0


def test_the_coefficient_moves_before_it_is_used_and_survives_json() -> None:
    # k1 is 2.5 nats on four responses, 0.625 each: a fifth too much at least, so 0.1 * (1 + 0.2 * 4 / 8)
    first = rloo(kl_target=0.1, kl_horizon=8)
    batch = first.targets(rollout())
    assert batch.metrics["policy/kl_coef"] == pytest.approx(0.11)
    assert batch.advantages is not None
    assert batch.advantages[0].item() == pytest.approx((1 + 0.11 * 0.5) - (3 - 0.11 * 2))
    second = rloo(kl_target=0.1, kl_horizon=8)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert advantages(second, rollout()) == advantages(first, rollout())
    assert second.state_dict() == first.state_dict() == {"kl_coef": pytest.approx(0.121)}


def test_rloo_is_what_its_settings_name() -> None:
    algorithm = build(RLOOSettings(group_size=3), alone, 16)
    assert type(algorithm) is RLOO and algorithm.group_size == algorithm.rows_per_prompt == 3


def test_rloo_learns_to_say_the_word_that_scores(bandit: Any, word_scorer: Any) -> None:
    learned = bandit.learn(bandit.settings(RLOOSettings(kl_coef=0.0)), word_scorer({"a": 1.0}))
    assert learned["p/a"] > 0.7
    assert learned["policy/first_ratio_gap"] < 1e-5


def test_a_sign_error_breaks_it(bandit: Any, word_scorer: Any) -> None:
    learned = bandit.learn(bandit.settings(RLOOSettings(kl_coef=0.0)), word_scorer({"a": 1.0}, sign=-1.0))
    assert learned["p/a"] < 0.05
