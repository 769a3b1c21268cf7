"""GRPO: advantages relative to the group, the loss and its normalisations by hand, and that it learns."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from components.rl.algorithm_settings import GRPOSettings
from components.rl.algorithms import build
from components.rl.algorithms.grpo import GRPO
from components.rl.types import Batch, Forward, Rollout

MASK = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [True, True, False]])
LOG2 = math.log(2)


def alone(tensor: Tensor) -> Tensor:
    return tensor


def rollout(**fields: Any) -> Rollout:
    """Two prompts, two responses each; the second response was cut. Outside the mask are numbers that must not count.

    The log-ratios of the reference to the policy are log 2, 0 | -log 2 | 0, 0, 0 | 0, 0.
    """
    old = torch.where(MASK, -1.0, 8.0)
    away = torch.tensor([[LOG2, 0.0, 5.0], [-LOG2, 5.0, 5.0], [0.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
    defaults: dict[str, Any] = {
        "input_ids": torch.arange(20).reshape(4, 5),
        "attention_mask": torch.cat([torch.ones(4, 2, dtype=torch.bool), MASK], 1),
        "mask": MASK,
        "logprobs": old,
        "ref_logprobs": old + away,
        "scores": torch.tensor([1.0, 3.0, 5.0, 4.0]),
        "ended": torch.tensor([True, False, True, True]),
        "group_size": 2,
    }
    return Rollout(**(defaults | fields))


def grpo(**fields: Any) -> GRPO:
    settings: dict[str, Any] = {"kl_coef": 0.1, "group_size": 2, "missing_eos": "none", "scale": "none"}
    return GRPO(GRPOSettings(**(settings | fields)), alone, 16)


def advantages(algorithm: GRPO, given: Rollout) -> list[float]:
    """Those of the first tokens."""
    found = algorithm.targets(given).advantages
    assert found is not None
    return found[:, 0].tolist()  # type: ignore[no-any-return]


def moved(batch: Batch) -> Forward:
    """Ratios 1.5, 0.5 | 1.5 | 1, 1, 1 | 5, 1 to the policy that sampled, and an entropy of 2 per token."""
    assert batch.logprobs is not None
    ratios = torch.tensor([[1.5, 0.5, 9.0], [1.5, 9.0, 9.0], [1.0, 1.0, 1.0], [5.0, 1.0, 9.0]])
    return Forward(batch.logprobs + ratios.log(), torch.full(ratios.shape, 2.0))


def test_targets_by_hand() -> None:
    batch = grpo().targets(rollout())
    assert batch.advantages is not None and batch.ref_logprobs is not None
    assert batch.advantages.tolist() == [[-1, -1, 0], [1, 0, 0], [0.5, 0.5, 0.5], [-0.5, -0.5, 0]]
    assert torch.equal(batch.ref_logprobs, rollout().ref_logprobs)
    assert batch.metrics == {"policy/kl_coef": 0.1, "policy/flat_groups": 0.0}
    assert (batch.unit, len(batch)) == (1, 4)


@pytest.mark.parametrize(
    ("scale", "divisors"),
    [
        ("group", [math.sqrt(2) + 0.25, math.sqrt(0.5) + 0.25]),
        ("batch", [math.sqrt((2.25**2 + 0.25**2 + 1.75**2 + 0.75**2) / 3) + 0.25] * 2),  # around 3.25
        ("none", [1.0, 1.0]),
    ],
)
def test_what_advantages_are_divided_by(scale: str, divisors: list[float]) -> None:
    first, second = divisors
    found = advantages(grpo(scale=scale, scale_eps=0.25), rollout())
    assert found == pytest.approx([-1 / first, 1 / first, 0.5 / second, -0.5 / second])


@pytest.mark.parametrize(("rule", "expected"), [("none", 3.0), ("penalty", 2.5), ("replace", -0.5)])
def test_a_response_that_did_not_end_is_scored_by_the_rule(rule: str, expected: float) -> None:
    found = advantages(grpo(missing_eos=rule, missing_eos_penalty=0.5), rollout())
    assert found == pytest.approx([(1 - expected) / 2, (expected - 1) / 2, 0.5, -0.5])


def test_scores_are_clamped_after_the_rule() -> None:
    far = rollout(scores=torch.tensor([-100.0, 100.0, 7.0, 100.0]))
    assert advantages(grpo(score_clip=8.0, missing_eos="penalty"), far) == [-8, 8, -0.5, 0.5]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_groups_of_equal_scores_teach_nothing_and_are_counted(
    scale: str, group_size: int, random_rollout: Any
) -> None:
    given = random_rollout(4, group_size)
    scores = given.scores.view(4, group_size).clone()
    scores[1], scores[3] = 0.1, 200.0  # equal, and equal once they are clamped
    scores[3, 0] = 100.0
    flat = rollout(**(vars(given) | {"scores": scores.flatten()}))
    batch = grpo(scale=scale, group_size=group_size).targets(flat)
    assert batch.advantages is not None
    groups = batch.advantages[:, 0].view(4, group_size)
    assert (groups[[1, 3]] == 0).all() and (groups[[0, 2]] != 0).all()
    assert batch.metrics["policy/flat_groups"] == 0.5


@pytest.mark.parametrize("scale", ["group", "none"])
def test_the_other_prompts_never_matter(scale: str, random_rollout: Any) -> None:
    given = random_rollout(3, 4)
    owners = 100.0 * torch.arange(3).repeat_interleave(4)  # scores that tell whose they are
    settings = {"group_size": 4, "score_clip": 1000.0, "scale": scale}
    plain = advantages(grpo(**settings), given)
    marked = advantages(grpo(**settings), rollout(**(vars(given) | {"scores": given.scores + owners})))
    assert marked == pytest.approx(plain, abs=1e-3)
    assert max(map(abs, plain)) > 0.5


# The clipped objective of `moved`, A = -1 | 1 | 0.5 | -0.5:
# -1.5, -0.8 (clipped) | 1.2 (clipped) | 0.5, 0.5, 0.5 | -2.5, -0.5
OBJECTIVE = [[-1.5, -0.8], [1.2], [0.5, 0.5, 0.5], [-2.5, -0.5]]


def by_hand(normalization: str, rows: list[list[float]]) -> float:
    """The sum over tokens, or over responses of their mean."""
    return sum(sum(row) / (len(row) if normalization == "sequence" else 1) for row in rows)


@pytest.mark.parametrize(("normalization", "terms"), [("token", 8), ("sequence", 4), ("constant", 4 * 16)])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_loss_by_hand(normalization: str, terms: int, estimator: str) -> None:
    algorithm = grpo(normalization=normalization, kl_estimator=estimator, entropy_coef=0.25)
    batch = algorithm.targets(rollout())
    total, means = algorithm.loss(batch, moved(batch))
    # log-ratios of the reference to the moved policy
    away = [[LOG2 - math.log(1.5), LOG2], [-LOG2 - math.log(1.5)], [0, 0, 0], [-math.log(5), 0]]
    estimate = {"k2": lambda d: d * d / 2, "k3": lambda d: math.exp(d) - d - 1}[estimator]
    loss = -by_hand(normalization, OBJECTIVE)
    kl = by_hand(normalization, [[estimate(d) for d in row] for row in away])
    entropy = by_hand(normalization, [[2.0] * len(row) for row in away])
    assert algorithm.terms(batch) == terms
    assert means["loss/policy"] == pytest.approx((loss, terms), rel=1e-5)
    assert means["loss/kl"] == pytest.approx((kl, terms), rel=1e-5)
    assert total.item() == pytest.approx(loss + 0.1 * kl - 0.25 * entropy, rel=1e-5)
    ratios = (1.5, 0.5, 1.5, 1, 1, 1, 5, 1)
    assert means["policy/ratio"] == pytest.approx((sum(ratios), 8), rel=1e-5)
    assert means["policy/approx_kl"] == pytest.approx((sum(r - 1 - math.log(r) for r in ratios), 8), rel=1e-5)
    assert means["policy/clip_fraction"] == (2, 8)
    assert means["policy/entropy"] == (16, 8)


def test_the_constant_may_be_stated() -> None:
    algorithm = grpo(normalization="constant", normalization_constant=7)
    assert algorithm.terms(algorithm.targets(rollout())) == 28


def test_clip_clip_higher_and_dual_clip_reach_the_objective() -> None:
    def objective(**fields: Any) -> float:
        algorithm = grpo(kl_coef=0.0, **fields)
        batch = algorithm.targets(rollout())
        return -algorithm.loss(batch, moved(batch))[0].item()

    plain = by_hand("token", OBJECTIVE)
    assert objective() == pytest.approx(plain, rel=1e-5)
    assert objective(clip=0.4) == pytest.approx(plain + 0.2 + 0.2, rel=1e-5)  # -0.6 for -0.8, 1.4 for 1.2
    assert objective(clip_high=0.4) == pytest.approx(plain + 0.2, rel=1e-5)
    assert objective(dual_clip=3.0) == pytest.approx(plain - 1.5 + 2.5, rel=1e-5)


def test_the_kl_is_in_the_loss_with_a_gradient_and_not_in_the_advantages() -> None:
    gradients = []
    for kl_coef in (0.0, 0.5):
        algorithm = grpo(kl_coef=kl_coef)
        batch = algorithm.targets(rollout())
        assert batch.logprobs is not None
        logprobs = batch.logprobs.clone().requires_grad_()
        algorithm.loss(batch, Forward(logprobs, torch.zeros(4, 3)))[0].backward()
        assert logprobs.grad is not None
        gradients.append(logprobs.grad)
    assert gradients[0].tolist() == [[1, 1, 0], [-1, 0, 0], [-0.5, -0.5, -0.5], [0.5, 0.5, 0]]
    # k3's gradient is 1 - e^d: -1 and 1/2 where the reference says twice and half as much
    difference = gradients[1] - gradients[0]
    torch.testing.assert_close(difference, 0.5 * torch.tensor([[-1.0, 0, 0], [0.5, 0, 0], [0, 0, 0], [0, 0, 0]]))


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
@pytest.mark.parametrize("micro", [1, 5])
def test_micro_batches_change_no_gradient_and_no_mean(
    normalization: str, micro: int, random_rollout: Any, update_gradient: Any
) -> None:
    algorithm = grpo(group_size=4, entropy_coef=0.1, normalization=normalization)
    batch = algorithm.targets(random_rollout(3, 4))
    (whole, means), (cut, cut_means) = (update_gradient(algorithm, batch, size) for size in (100, micro))
    torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-5)
    assert cut_means == pytest.approx(means, rel=1e-5)
    assert whole[:2].abs().sum() > 0 and whole[2:].abs().sum() == 0


def test_the_coefficient_moves_before_it_is_used_and_survives_json() -> None:
    # k3 is 1 - log 2 and log 2 - 1/2 nats, 0.125 per response: far above the target, so 0.1 * (1 + 0.2 * 4 / 8)
    first = grpo(kl_target=0.01, kl_horizon=8)
    batch = first.targets(rollout())
    assert batch.metrics["policy/kl_coef"] == pytest.approx(0.11)
    assert batch.logprobs is not None
    total, means = first.loss(batch, Forward(batch.logprobs, torch.zeros(4, 3)))
    assert total.item() == pytest.approx(means["loss/policy"][0] + 0.11 * means["loss/kl"][0], rel=1e-5)
    second = grpo(kl_target=0.01, kl_horizon=8)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.targets(rollout()).metrics == first.targets(rollout()).metrics
    assert second.state_dict() == first.state_dict() == {"kl_coef": pytest.approx(0.121)}


def test_below_its_target_the_kl_may_cost_less() -> None:
    given = rollout(ref_logprobs=torch.where(MASK, -1.0, 8.0) + torch.tensor([[LOG2, 0.0, 5.0]] + [[0.0] * 3] * 3))
    exact = (1 - LOG2) / 4  # k3's 2 - log 2 - 1 nats on four responses
    for target, sign in ((exact / 1.1, 1), (exact / 0.9, -1)):
        algorithm = grpo(kl_target=target, kl_horizon=8)
        assert algorithm.targets(given).metrics["policy/kl_coef"] == pytest.approx(0.1 * (1 + sign * 0.1 * 4 / 8))


def test_grpo_is_what_its_settings_name() -> None:
    algorithm = build(GRPOSettings(group_size=3, normalization="constant"), alone, 20)
    assert type(algorithm) is GRPO and algorithm.group_size == algorithm.rows_per_prompt == 3
    assert algorithm.constant == 20


def test_grpo_learns_to_say_the_word_that_scores(bandit: Any, word_scorer: Any) -> None:
    learned = bandit.learn(bandit.settings(GRPOSettings(kl_coef=0.0)), word_scorer({"a": 1.0}))
    assert learned["p/a"] > 0.7
    assert learned["policy/first_ratio_gap"] < 1e-5


def test_a_sign_error_breaks_it(bandit: Any, word_scorer: Any) -> None:
    learned = bandit.learn(bandit.settings(GRPOSettings(kl_coef=0.0)), word_scorer({"a": 1.0}, sign=-1.0))
    assert learned["p/a"] < 0.05


def test_the_kl_in_the_loss_holds_the_policy_back(bandit: Any, word_scorer: Any) -> None:
    free, held = (
        bandit.learn(bandit.settings(GRPOSettings(kl_coef=kl_coef)), word_scorer({"a": 1.0}))
        for kl_coef in (0.0, 1.0)
    )
    assert held["rollout/kl_k3"] < free["rollout/kl_k3"] / 3
    assert held["p/a"] < free["p/a"]


def test_minibatches_hold_whole_groups_where_they_fit(random_rollout: Any) -> None:
    batch = grpo(group_size=4).targets(random_rollout(6, 4))
    for rows in batch.plan(1, 8, seed=0):
        assert (rows.reshape(2, 4) // 4).unique(dim=1).shape == (2, 1)
