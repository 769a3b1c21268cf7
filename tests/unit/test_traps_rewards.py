"""Traps between scores and advantages: groups, ties, missing ends, whitening, clamps, and where critics start."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from components.artifacts import DataDir, ModelCard
from components.evaluate.samples import Answer, outcome
from components.generation import Response
from components.generation.native import NativeSampler
from components.models import load_policy
from components.records import Conversation, Message
from components.rl.alerts import rl_monitor
from components.rl.algorithm_settings import (
    BestOfKSettings,
    GRPOSettings,
    OnlineDPOSettings,
    PPOLagSettings,
    PPOSettings,
    RLOOSettings,
)
from components.rl.algorithms import build
from components.rl.assembly import build_networks
from components.rl.drafts import Models, drafted
from components.rl.networks import Networks, SharedHead
from components.rl.reference import FrozenReference
from components.rl.rollout import read, rollout_metrics
from components.rl.settings import AlertSettings, RLSettings
from components.rl.types import Batch, Forward, Rollout
from components.scoring import load_scorer
from components.settings import Generation
from components.tokens import encode_prompt, encode_response, load_tokenizer

PLAIN: dict[str, Any] = {"kl_coef": 0.0, "missing_eos": "none"}
ONLINE: tuple[Any, ...] = (
    PPOSettings(kl_coef=0.0, whiten_advantages=False),
    PPOLagSettings(kl_coef=0.0, whiten_advantages=False, lambda_init=1e-6),
    RLOOSettings(kl_coef=0.0, group_size=2),
    GRPOSettings(kl_coef=0.0, group_size=2),
    OnlineDPOSettings(),
    BestOfKSettings(group_size=2),
)


def alone(tensor: Tensor) -> Tensor:
    return tensor


def made(settings: Any) -> Any:
    """The algorithm that the settings name, for responses of at most four tokens."""
    return build(settings, alone, 4)


def rollout(scores: Sequence[float], group_size: int, **fields: Any) -> Rollout:
    """Responses of two, three, four, two ... tokens, all different, that only their scores and lengths tell apart."""
    rows = len(scores)
    mask = torch.arange(4) < torch.tensor([2 + row % 3 for row in range(rows)])[:, None]
    defaults: dict[str, Any] = {
        "input_ids": torch.arange(rows * 6).view(rows, 6),
        "attention_mask": torch.cat([torch.ones(rows, 2, dtype=torch.bool), mask], 1),
        "mask": mask,
        "logprobs": -1.0 * mask,
        "ref_logprobs": -1.0 * mask,
        "scores": torch.tensor(scores, dtype=torch.float32),
        "ended": torch.ones(rows, dtype=torch.bool),
        "costs": torch.zeros(rows),
        "values": torch.zeros(rows, 4),
        "cost_values": torch.zeros(rows, 4),
        "group_size": group_size,
    }
    return Rollout(**(defaults | fields))


def loss_of(algorithm: Any, batch: Batch, logprobs: Tensor) -> Tensor:
    """The loss with these log-probabilities and the rollout's own values."""
    values = torch.zeros_like(logprobs.detach())
    forward = Forward(logprobs, values, values, values)
    total: Tensor = algorithm.loss(batch, forward)[0]
    return total


def pull(settings: Any, given: Rollout) -> list[float]:
    """By how much the loss wants each response of the rollout more likely, per token; 0 where it teaches nothing."""
    algorithm = made(settings)
    batch = algorithm.targets(given)
    logprobs = torch.full(batch.mask.shape, -1.0).requires_grad_()
    loss_of(algorithm, batch, logprobs).backward()
    assert logprobs.grad is not None
    wanted = dict.fromkeys(given.input_ids[:, 0].tolist(), 0.0)
    for row, gradient in zip(batch.input_ids[:, 0].tolist(), logprobs.grad.sum(1) / batch.mask.sum(1), strict=True):
        wanted[row] -= float(gradient)
    return list(wanted.values())


class OwnerScorer:
    """Scores a response by its prompt alone."""

    metrics: dict[str, float] = {}  # noqa: RUF012

    def score(self, prompts: Sequence[Conversation], responses: Sequence[Response]) -> Tensor:
        """The length of each prompt (B,)."""
        return torch.tensor([float(len(prompt[0].content)) for prompt in prompts])


@pytest.fixture(scope="module")
def owned(policy_folder: Path) -> Rollout:
    """Three prompts with two responses each, whose scores tell which prompt a response is of."""
    tokenizer, policy = load_tokenizer(policy_folder), load_policy(policy_folder)
    sampler = NativeSampler(policy, tokenizer.eos_token_id, Generation(max_new_tokens=4), seed=0)
    reference = FrozenReference(policy, "fp32")
    models = Models(sampler, reference, OwnerScorer(), None, tokenizer, 1.0, "fp32")
    prompts = [(Message("user", text),) for text in ("say red", "a", "say seven three")]
    return read(Networks(policy), drafted(models, prompts, group_size=2, max_prompt=64, micro=4), 4)[0]


@pytest.mark.parametrize("settings", ONLINE[2:], ids=lambda settings: settings.name)
def test_responses_are_compared_with_those_of_their_own_prompt(settings: Any, owned: Rollout) -> None:
    settings = settings.model_copy(update={"missing_eos": "none", "score_clip": 100.0})
    batch = made(settings).targets(owned)
    other_layout = owned.scores.view(2, 3).T.flatten()  # as if all prompts came once, and then all once more
    mixed = made(settings).targets(replace(owned, scores=other_layout))
    if settings.name == "online_dpo":
        assert len(batch) == 0 and len(mixed) > 0
    elif settings.name == "best_of_k":
        assert batch.metrics["policy/flat_groups"] == 1 and mixed.metrics["policy/flat_groups"] < 1
    else:
        assert (batch.advantages == 0).all() and (mixed.advantages != 0).any()  # type: ignore[union-attr]


def test_a_group_without_a_best_has_no_advantage_though_rounding_says_so() -> None:
    given = rollout([0.7] * 7 + [1.0, 0.0] * 3 + [1.0], 7)
    scores = given.scores[:7]
    naive = (scores - scores.mean()) / (scores.std() + 1e-6)  # verl's epsilon
    assert naive.abs().max() > 0.05
    batch = made(GRPOSettings(**PLAIN, group_size=7)).targets(given)
    assert batch.advantages is not None
    assert (batch.advantages[:7] == 0).all() and (batch.advantages[7:][batch.mask[7:]] != 0).all()
    assert batch.metrics["policy/flat_groups"] == 0.5


@pytest.mark.parametrize(("eps", "size"), [(1e-4, 0.0468), (1e-6, 0.62)])
def test_the_epsilon_decides_what_a_nearly_flat_group_teaches(eps: float, size: float) -> None:
    # 1 and 1 + 1e-5 have the deviation 1e-5 / sqrt(2) = 7.07e-6 and the advantage 5e-6 / (7.07e-6 + eps).
    batch = made(GRPOSettings(**PLAIN, group_size=2, scale_eps=eps)).targets(rollout([1.0, 1.00001], 2))
    assert batch.advantages is not None
    assert batch.advantages.max().item() == pytest.approx(size, rel=0.02)  # 1e-7 is rounding


def test_ties_and_equal_texts_are_no_pairs_and_are_counted() -> None:
    same_ids = torch.arange(24).view(4, 6)
    same_ids[3], same_length = same_ids[2], torch.arange(4) < torch.tensor([2, 3, 3, 3])[:, None]
    given = rollout([1.0, 1.0, 0.0, 2.0], 2, input_ids=same_ids, mask=same_length)
    batch = made(OnlineDPOSettings()).targets(given)
    assert len(batch) == 0 and batch.metrics["rollout/informative_pairs"] == 0
    # argmax and argmin of a tie are the same response: chosen and rejected at once, it teaches nothing
    groups = given.scores.view(-1, 2)
    assert groups.argmax(1)[0] == groups.argmin(1)[0]
    apart = made(OnlineDPOSettings()).targets(replace(given, scores=torch.tensor([1.0, 1.5, 0.0, 2.0])))
    assert apart.input_ids[:, 0].tolist() == [6, 0] and apart.metrics["rollout/informative_pairs"] == 0.5


@pytest.mark.parametrize("k", [2, 3, 8])
def test_the_best_of_any_number_is_kept_and_of_equals_the_first(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    scores = torch.randn(5 * k, generator=generator)
    scores[: 2 * k] = scores[: 2 * k].round()  # groups in which several may be best
    scores[:k] = 1.0
    batch = made(BestOfKSettings(group_size=k)).targets(rollout(scores.tolist(), k))
    kept = [row // 6 for row in batch.input_ids[:, 0].tolist()]
    groups = scores.view(-1, k).tolist()
    assert kept == [number * k + group.index(max(group)) for number, group in enumerate(groups)]
    assert kept[0] == 0


def test_the_best_of_more_is_better_and_strays_no_further_than_the_bound() -> None:
    # Of m equally likely scores the best of k is r with the probability (r / m)^k - ((r - 1) / m)^k.
    m, means = 50, [25.5]
    ranks = torch.arange(1, m + 1, dtype=torch.float64)
    for k in (2, 4, 8):
        chances = (ranks / m) ** k - ((ranks - 1) / m) ** k
        assert (chances * (chances * m).log()).sum() <= math.log(k) - (k - 1) / k
        scores = torch.randint(1, m + 1, (2000 * k,), generator=torch.Generator().manual_seed(k)).tolist()
        batch = made(BestOfKSettings(group_size=k, score_clip=100.0)).targets(rollout(scores, k))
        means.append(batch.metrics["rollout/best_score"])
        assert means[-1] == pytest.approx(float((chances * ranks).sum()), rel=0.03)
    assert means == sorted(means)


@pytest.mark.parametrize(
    ("normalization", "constant", "expected"),
    [
        # Responses of 2 and 4 tokens: what each token's log-probability weighs in the loss.
        ("token", None, [1 / 6, 1 / 6]),
        ("sequence", None, [1 / 4, 1 / 8]),  # every response half, whatever its length
        ("constant", 1, [1 / 2, 1 / 2]),  # the sum per response: a long one weighs more
        ("constant", None, [1 / 8, 1 / 8]),
    ],
)
@pytest.mark.parametrize("settings", [BestOfKSettings(), PPOSettings(), GRPOSettings(kl_coef=0)], ids=lambda s: s.name)
def test_the_normalisation_decides_what_long_responses_weigh(
    settings: Any, normalization: Any, constant: int | None, expected: list[float]
) -> None:
    fields = {"normalization": normalization, "normalization_constant": constant}
    algorithm = made(settings.model_copy(update=fields))
    mask, zeros = torch.arange(4) < torch.tensor([[2], [4]]), torch.zeros(2, 4)
    old = torch.full((2, 4), -1.0)
    known = {"advantages": torch.ones(2, 4), "values": zeros, "returns": zeros, "ref_logprobs": old}
    batch = Batch(torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.bool), mask, old, **known)
    logprobs = old.clone().requires_grad_()
    (loss_of(algorithm, batch, logprobs) / algorithm.terms(batch)).backward()
    assert logprobs.grad is not None
    for row in range(2):
        assert (-logprobs.grad[row][mask[row]]).tolist() == pytest.approx([expected[row]] * int(mask[row].sum()))


@pytest.mark.parametrize("settings", ONLINE, ids=lambda settings: settings.name)
def test_a_response_that_was_cut_loses_against_one_that_ended(settings: Any) -> None:
    given = rollout([0.9, 0.4], getattr(settings, "group_size", 1), ended=torch.tensor([False, True]))
    for rule, cut_wins in (("penalty", False), ("replace", False), ("none", True)):
        cut, ended = pull(settings.model_copy(update={"missing_eos": rule}), given)
        assert (cut > ended) == cut_wins, rule
    assert rollout_metrics(given)["rollout/missing_eos"] == 0.5


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("penalty", [2.0, -4.0]), ("replace", [2.0, -3.0]), ("none", [2.0, -1.0])],
)
def test_the_rules_for_a_missing_end_by_hand(rule: Any, expected: list[float]) -> None:
    settings = RLOOSettings(kl_coef=0.0, group_size=2, missing_eos=rule, missing_eos_penalty=3.0)
    batch = made(settings).targets(rollout([2.0, -1.0], 2, ended=torch.tensor([True, False])))
    difference = expected[0] - expected[1]  # each response against the other
    assert batch.advantages is not None
    assert batch.advantages.tolist() == pytest.approx([difference, -difference])


def test_estimators_are_offered_where_they_are_right_and_nowhere_else() -> None:
    for settings, refused in ((PPOSettings, "k2"), (RLOOSettings, "k2"), (GRPOSettings, "k1")):
        with pytest.raises(ValidationError, match="kl_estimator"):
            settings(kl_estimator=refused)


@pytest.mark.parametrize("settings", [PPOSettings(), RLOOSettings(group_size=2)], ids=["ppo", "rloo"])
def test_a_kl_in_the_reward_is_in_no_loss(settings: Any) -> None:
    settings = settings.model_copy(update={"kl_coef": 0.5})
    near = rollout([1.0, 0.0], getattr(settings, "group_size", 1))
    far = replace(near, ref_logprobs=near.ref_logprobs - torch.tensor([[1.0], [0.2]]))
    algorithm = made(settings)
    batches = [algorithm.targets(given) for given in (near, far)]
    assert not torch.allclose(batches[0].advantages, batches[1].advantages)
    assert batches[1].ref_logprobs is None  # so the loss cannot count it a second time


def test_a_kl_in_the_loss_is_in_no_reward_and_carries_the_gradient() -> None:
    near = rollout([1.0, 0.0], 2)
    far = replace(near, ref_logprobs=near.ref_logprobs - torch.tensor([[1.0], [0.2]]))
    algorithm = made(GRPOSettings(kl_coef=0.5, group_size=2))
    batches = [algorithm.targets(given) for given in (near, far)]
    assert torch.equal(batches[0].advantages, batches[1].advantages)
    logprobs = near.logprobs.clone().requires_grad_()
    gradients = [torch.autograd.grad(loss_of(algorithm, batch, logprobs), logprobs)[0] for batch in batches]
    # d/dx of exp(r - x) - (r - x) - 1 at r - x = -1 and -0.2
    slope = 0.5 * (1 - torch.tensor([[-1.0], [-0.2]]).exp())
    torch.testing.assert_close(gradients[1] - gradients[0], slope * near.mask)


def test_rloo_clamps_the_score_and_not_the_kl() -> None:
    far = rollout([100.0, 0.0], 2, ref_logprobs=torch.tensor([[-11.0, -1.0, 0, 0], [-1.0, -1.0, -1.0, 0]]))
    batch = made(RLOOSettings(kl_coef=2.0, group_size=2, score_clip=5.0, missing_eos="none")).targets(far)
    assert batch.advantages is not None
    assert batch.advantages[0].item() == pytest.approx(5 - 2 * 10)
    clamped_after = min(max(100.0 - 2 * 10, -5.0), 5.0)  # the KL would not count at all
    assert abs(batch.advantages[0].item() - clamped_after) > 10


def test_token_rewards_are_whitened_around_their_own_mean() -> None:
    given = rollout([3.0, 1.0, 2.0], 1)
    settings = PPOSettings(**PLAIN, lam=1.0, whiten_advantages=False, whiten_rewards=True)
    batch = made(settings).targets(given)
    rewards = torch.zeros(3, 4)
    rewards[0, 1], rewards[1, 2], rewards[2, 3] = 3.0, 1.0, 2.0  # 9 tokens, mean 6/9
    deviation = rewards[given.mask].std(unbiased=False)
    kept_mean = (rewards - 6 / 9) / deviation + 6 / 9
    assert batch.returns is not None
    expected = [float(kept_mean[row][given.mask[row]].sum()) for row in range(3)]
    assert batch.returns[:, 0].tolist() == pytest.approx(expected, rel=1e-4)
    shifted = [float(((rewards - 6 / 9) / deviation)[row][given.mask[row]].sum()) for row in range(3)]
    assert abs(expected[0] - shifted[0]) > 0.5


def test_advantages_are_whitened_over_the_whole_rollout_and_not_over_a_minibatch() -> None:
    given = rollout([5.0, 4.0, -4.0, -5.0], 1)
    algorithm = made(PPOSettings(**PLAIN))
    batch = algorithm.targets(given)
    good = batch.rows(torch.tensor([0, 1]))
    assert good.advantages is not None
    seen = good.advantages[good.mask]
    assert (seen > 0).all()  # good responses stay good in the company of good ones
    own = (seen - seen.mean()) / seen.std(unbiased=False)
    assert (own < 0).any()  # whitened among themselves one of them would be punished


@pytest.fixture
def critics(policy_folder: Path, reward_folder: Path, cost_folder: Path) -> Networks:
    return build_networks(RLSettings(algorithm=PPOLagSettings()), policy_folder, reward_folder, cost_folder)


def test_critics_start_as_the_models_that_score(
    critics: Networks, reward_folder: Path, cost_folder: Path, data_folder: Path
) -> None:
    tokenizer = load_tokenizer(reward_folder)
    (row, *_) = DataDir(data_folder).demonstrations("train")
    ids = encode_prompt(tokenizer, row.prompt) + encode_response(tokenizer, row.response)
    dummy = [*ids, 0]  # the last value is that of the state before the last token
    mask = torch.ones(1, len(dummy), dtype=torch.bool)
    with torch.no_grad():
        forward = critics.eval()(torch.tensor([dummy]), mask, 3)
    for folder, values in ((reward_folder, forward.values), (cost_folder, forward.cost_values)):
        score = load_scorer(folder).score([row.prompt], [Response(row.response, (), ended=True)])
        assert values[0, -1].item() == pytest.approx(score.item(), abs=1e-4)
        card = ModelCard.read(folder)
        raw = score.item() * card.score_std + card.score_mean
        assert abs(values[0, -1].item() - raw) > 1e-2  # in the units that scores, clamps and value_clip are in


def test_old_values_are_those_of_the_rollout_whatever_the_critic_says_now() -> None:
    algorithm = made(PPOSettings(**PLAIN, value_clip=0.2, lam=1.0, whiten_advantages=False))
    batch = algorithm.targets(rollout([1.0], 1, values=torch.full((1, 4), 0.25)))
    zeros = torch.zeros(1, 4)
    now = torch.full((1, 4), 0.75)  # after some updates
    _, means = algorithm.loss(batch, Forward(-1.0 * batch.mask, zeros, now))
    # max((0.75 - 1)^2, (0.25 + 0.2 - 1)^2) / 2 for two tokens; around the new values it would be 0.0625
    assert means["loss/value"][0] == pytest.approx(0.55**2)


def test_scores_are_logged_as_they_are_and_a_drift_into_the_clamp_is_told() -> None:
    settings = PPOSettings(score_clip=5.0)
    monitor = rl_monitor(AlertSettings(patience=1), "fp32", settings)
    given = rollout([40.0, 60.0], 1)
    batch = made(settings).targets(given)
    metrics = rollout_metrics(given)
    assert batch.returns is not None and batch.returns.max() <= 5.0
    assert metrics["rollout/score"] == 50.0 and metrics["rollout/score_max"] == 60.0
    monitor.observe(metrics, 1)
    assert [alert.name for alert in monitor.alerts] == ["clamped_scores"]


def test_a_critic_on_the_policy_s_backbone_gives_the_policy_no_gradient(
    policy_folder: Path, reward_folder: Path
) -> None:
    settings = RLSettings(algorithm=PPOSettings(), share_backbone=True)
    networks = build_networks(settings, policy_folder, reward_folder, None)
    ids, mask = torch.arange(10, 18)[None], torch.ones(1, 8, dtype=torch.bool)

    def value_gradient() -> tuple[float, float]:
        networks.zero_grad()
        (networks(ids, mask, 4).values - 1.0).square().sum().backward()
        sizes = [
            sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None)
            for part in (networks.policy, networks.value)
        ]
        return sizes[0], sizes[1]

    assert isinstance(networks.value, SharedHead)
    torch.nn.init.normal_(networks.value.layers[-1].weight)
    to_policy, to_head = value_gradient()
    assert to_policy == 0 and to_head > 0
    leaky = networks.value.layers
    networks.value.forward = lambda hidden: leaky(hidden.float()).squeeze(-1)  # type: ignore[method-assign]
    assert value_gradient()[0] > 1.0  # the same head without the cut


def test_a_comparison_does_not_depend_on_who_is_named_first() -> None:
    def answer(text: str, reward: float) -> Answer:
        return Answer(Response(text, (), ended=True), reward, None, {}, {})

    answers = [answer("a", 1.0), answer("b", 1.2), answer("c", -0.5), answer("c", 0.5)]
    for first in answers:
        for second in answers:
            assert outcome(first, second, 0.3) + outcome(second, first, 0.3) == 1.0
    assert outcome(answers[0], answers[1], 0.3) == outcome(answers[2], answers[3], 0.3) == 0.5
    assert outcome(answers[1], answers[0], 0.0) == 1.0
