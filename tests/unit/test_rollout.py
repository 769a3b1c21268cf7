"""Rollouts: what is collected belongs to its own prompt, and the reference is read as the policy is."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from components.generation import Response
from components.generation.native import NativeSampler
from components.logprobs import response_logprobs
from components.models import load_policy, load_scalar
from components.phases import Phases
from components.records import Conversation, Message
from components.rl import algorithms
from components.rl.algorithm_settings import AlgorithmSettings, GRPOSettings, OnlineDPOSettings, RLOOSettings
from components.rl.drafts import Draft, Drafting, Models, drafted
from components.rl.networks import Networks
from components.rl.reference import FrozenReference
from components.rl.rollout import AGREEMENT, LIKENESS, RolloutSource, read, rollout_metrics
from components.rl.stream import Stream
from components.rl.types import Rollout
from components.settings import Generation
from components.tokens import encode_prompt, load_tokenizer

PROMPTS = [(Message("user", text),) for text in ("say red", "a", "say seven three")]
TEMPERATURE = 0.7


class OwnerScorer:
    """Scores a response by the length of its prompt, and remembers what it was shown."""

    def __init__(self) -> None:
        self.responses: list[Response] = []

    def score(self, prompts: Sequence[Conversation], responses: Sequence[Response]) -> Tensor:
        """Scores (B,)."""
        self.responses += responses
        return torch.tensor([float(len(prompt[0].content)) for prompt in prompts])

    metrics: ClassVar[dict[str, float]] = {}


@pytest.fixture(scope="module")
def networks(policy_folder: Path, reward_folder: Path) -> Networks:
    return Networks(load_policy(policy_folder), load_scalar(reward_folder), None, TEMPERATURE)


@pytest.fixture(scope="module")
def models(policy_folder: Path, networks: Networks) -> Models:
    tokenizer = load_tokenizer(policy_folder)
    generation = Generation(max_new_tokens=5, temperature=TEMPERATURE)
    return Models(
        NativeSampler(networks.policy, tokenizer.eos_token_id, generation, seed=0),
        FrozenReference(load_policy(policy_folder), "fp32"),
        OwnerScorer(),
        None,
        tokenizer,
        TEMPERATURE,
        "fp32",
    )


@pytest.fixture(scope="module")
def draft(models: Models) -> Draft:
    return drafted(models, PROMPTS, group_size=2, max_prompt=64, micro=4)


@pytest.fixture(scope="module")
def rollout(networks: Networks, draft: Draft) -> Rollout:
    return read(networks, draft, 4)[0]


def test_responses_of_a_group_are_neighbours_and_scored_with_their_own_prompt(
    rollout: Rollout, models: Models
) -> None:
    assert rollout.scores.tolist() == [7, 7, 1, 1, 15, 15]
    assert rollout.group_size == 2
    width = rollout.input_ids.shape[1] - rollout.mask.shape[1]
    for row, prompt in enumerate(prompt for prompt in PROMPTS for _ in range(2)):
        real = rollout.attention_mask[row, :width]
        assert rollout.input_ids[row, :width][real].tolist() == encode_prompt(models.tokenizer, prompt)


def test_the_reference_is_read_at_the_temperature_of_the_policy(rollout: Rollout) -> None:
    torch.testing.assert_close(rollout.ref_logprobs, rollout.logprobs, atol=1e-5, rtol=1e-5)
    metrics = rollout_metrics(rollout)
    assert metrics["rollout/kl_k1"] == pytest.approx(0, abs=1e-4)
    assert metrics["rollout/logprob"] == pytest.approx(rollout.logprobs[rollout.mask].mean().item(), rel=1e-5)


@torch.no_grad()
def test_a_row_alone_has_the_same_logprobs_and_values(rollout: Rollout, networks: Networks) -> None:
    for row in range(len(rollout.input_ids)):
        ids = rollout.input_ids[row][rollout.attention_mask[row]][None]
        mask, length = torch.ones_like(ids, dtype=torch.bool), int(rollout.mask[row].sum())
        logprobs, _ = response_logprobs(networks.policy, ids, mask, length, TEMPERATURE)
        torch.testing.assert_close(rollout.logprobs[row, :length], logprobs[0], atol=1e-4, rtol=1e-4)
        values = networks(ids, mask, length).values[0]
        assert rollout.values is not None
        torch.testing.assert_close(rollout.values[row, :length], values, atol=1e-4, rtol=1e-4)
        assert (rollout.logprobs[row, length:] == 0).all()


def test_micro_batches_change_no_number(models: Models, networks: Networks, rollout: Rollout) -> None:
    again = Models(**(vars(models) | {"sampler": Replay(rollout)}))
    for micro in (1, 100):
        other, _ = read(networks, drafted(again, PROMPTS, group_size=2, max_prompt=64, micro=micro), micro)
        torch.testing.assert_close(other.logprobs, rollout.logprobs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other.ref_logprobs, rollout.ref_logprobs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other.values, rollout.values, atol=1e-5, rtol=1e-5)


class Replay:
    """A sampler that gives the responses of a rollout again."""

    on_policy = True

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout
        self.metrics: dict[str, float] = {}

    def sample(self, prompts: Sequence[Sequence[int]], k: int = 1) -> Any:
        """The same responses."""
        from components.generation import Samples

        rollout = self.rollout
        length = rollout.mask.shape[1]
        return Samples(rollout.input_ids[:, -length:], rollout.mask, rollout.logprobs, rollout.ended)


class Elsewhere(Replay):
    """Another engine: the same responses, each log-probability lower by `gap`; asked for what it is to remember."""

    on_policy = False

    def __init__(self, rollout: Rollout, gap: float) -> None:
        super().__init__(rollout)
        self.gap, self.metrics, self.place = gap, {"sampler/version": 7.0}, torch.tensor([3])

    def sample(self, prompts: Sequence[Sequence[int]], k: int = 1) -> Any:
        """The same responses, with the other log-probabilities."""
        samples = super().sample(prompts, k)
        return replace(samples, logprobs=(samples.logprobs - self.gap) * samples.mask)

    def state(self) -> Tensor:
        """Where it stands."""
        return self.place

    def restore(self, state: Tensor) -> None:
        """Take back what `state` gave."""
        self.place = state


def source(
    models: Models,
    networks: Networks,
    settings: AlgorithmSettings,
    sampler: Any,
    sole_update: bool = False,
    phases: Phases | None = None,
) -> RolloutSource:
    algorithm = algorithms.build(settings, lambda tensor: tensor, 5)
    assert hasattr(algorithm, "targets")
    phases = phases or Phases()
    given = Models(**(vars(models) | {"sampler": sampler, "phases": phases}))
    stream = Stream(PROMPTS, 0)
    stream._order = lambda _: [0, 1, 2]  # type: ignore[assignment]  # that of the rollout
    drafts = Drafting(given, stream, len(PROMPTS), 2, 64, 4)
    return RolloutSource(drafts, networks, algorithm, len(PROMPTS), 4, 1.2, sole_update, phases)


def test_what_another_engine_sampled_is_weighted(models: Models, networks: Networks, rollout: Rollout) -> None:
    gap = 0.1
    batch = source(models, networks, GRPOSettings(group_size=2), Elsewhere(rollout, gap)).batch(0)
    assert batch.weights is not None
    expected = torch.full(batch.mask.shape, math.exp(gap)) * batch.mask
    torch.testing.assert_close(batch.weights, expected, atol=1e-4, rtol=1e-4)
    assert batch.metrics["sampler/logprob_gap"] == pytest.approx(gap, abs=1e-4)
    assert batch.metrics["sampler/weight"] == pytest.approx(math.exp(gap), abs=1e-4)
    assert batch.metrics["sampler/effective"] == pytest.approx(1) and batch.metrics["sampler/version"] == 7
    whole = source(models, networks, RLOOSettings(group_size=2), Elsewhere(rollout, gap)).batch(0)
    assert whole.weights is not None
    by_length = (gap * whole.mask.sum(1)).exp().clamp(max=1.2)
    torch.testing.assert_close(whole.weights, by_length, atol=1e-3, rtol=1e-3)


def test_the_policys_own_samples_are_measured_and_not_weighted(models: Models, networks: Networks) -> None:
    own = source(models, networks, GRPOSettings(group_size=2), models.sampler)
    batch = own.batch(0)
    assert batch.weights is None and "sampler/weight" not in batch.metrics
    assert batch.metrics["sampler/logprob_gap_max"] < 1e-4


def test_algorithms_without_a_policy_gradient_measure_and_weigh_nothing(
    models: Models, networks: Networks, rollout: Rollout
) -> None:
    batch = source(models, networks, OnlineDPOSettings(group_size=2), Elsewhere(rollout, 0.1)).batch(0)
    assert batch.weights is None and batch.metrics["sampler/logprob_gap"] == pytest.approx(0.1, abs=1e-4)


def test_the_state_of_a_source_is_its_samplers(models: Models, networks: Networks, rollout: Rollout) -> None:
    made = source(models, networks, GRPOSettings(group_size=2), Elsewhere(rollout, 0.1))
    state = made.state()()
    made.restore({name: tensor + 2 for name, tensor in state.items()})
    assert {name: int(tensor) for name, tensor in made.state()().items()} == {"random.sampler": 5}


class Reading(Networks):
    """Networks that count the rows they read."""

    def __init__(self, policy: Any) -> None:
        super().__init__(policy, temperature=TEMPERATURE)
        self.rows = 0

    def forward(self, input_ids: Tensor, *given: Any) -> Any:
        """What the networks say."""
        self.rows += len(input_ids)
        return super().forward(input_ids, *given)


@pytest.mark.parametrize("wrong", [False, True])
def test_scores_reference_and_reading_are_timed_by_the_tokens_of_the_rows(
    models: Models, networks: Networks, rollout: Rollout, wrong: bool
) -> None:
    phases, sampler = Phases(), Elsewhere(rollout, float(wrong))
    sampler.on_policy = True
    reading = Reading(networks.policy)
    batch = source(models, reading, GRPOSettings(group_size=2), sampler, phases=phases).batch(0)
    metrics = phases.lap()
    tokens = {
        name: round(metrics[f"perf/{name}_s"] * metrics[f"perf/{name}_tokens_per_s"], 6)
        for name in ("score", "reference", "read")
    }
    group, every = int(batch.attention_mask[:2].sum()), int(batch.attention_mask.sum())
    assert 0 < group < every
    assert tokens == {"score": every, "reference": every, "read": group + wrong * every}


def test_what_the_sampler_says_is_taken_where_the_trainer_agrees(models: Models, networks: Networks) -> None:
    reading = Reading(networks.policy)
    own = source(models, reading, GRPOSettings(group_size=2), models.sampler)
    batch = own.batch(0)
    assert reading.rows == 2 and batch.metrics["sampler/reused"] == 1  # one group of three
    assert batch.metrics["sampler/logprob_gap_max"] <= AGREEMENT
    whole = reading(batch.input_ids, batch.attention_mask, batch.mask.shape[1]).logprobs
    torch.testing.assert_close(batch.logprobs, whole.detach(), atol=AGREEMENT, rtol=0)


def test_every_group_is_looked_at_in_its_turn(models: Models, networks: Networks, rollout: Rollout) -> None:
    wrong = Elsewhere(rollout, 0.0)
    wrong.on_policy, wrong.gap = True, torch.tensor([0, 0, 0, 0, 0.1, 0.1])[:, None]  # type: ignore[assignment]
    reading = Reading(networks.policy)
    own = source(models, reading, GRPOSettings(group_size=2), wrong)
    own.drafts.stream.batch = lambda number, size: PROMPTS  # type: ignore[attr-defined]
    reused = [own.batch(number).metrics["sampler/reused"] for number in range(3)]
    assert reused == [1, 1, 0]


def test_what_the_sampler_says_is_computed_anew_where_the_trainer_disagrees(
    models: Models, networks: Networks, rollout: Rollout
) -> None:
    wrong = Elsewhere(rollout, 2 * AGREEMENT)
    wrong.on_policy = True
    reading = Reading(networks.policy)
    batch = source(models, reading, GRPOSettings(group_size=2), wrong).batch(0)
    assert reading.rows == 2 + 6 and batch.metrics["sampler/reused"] == 0
    torch.testing.assert_close(batch.logprobs, rollout.logprobs, atol=1e-5, rtol=1e-5)
    assert batch.metrics["sampler/logprob_gap_max"] == pytest.approx(2 * AGREEMENT, rel=0.1)


def test_before_the_only_update_the_old_policy_is_its_own_forward_pass(
    models: Models, networks: Networks, rollout: Rollout
) -> None:
    bfloat16 = Elsewhere(rollout, 0.9 * LIKENESS)
    bfloat16.on_policy = True
    reading = Reading(networks.policy)
    own = source(models, reading, GRPOSettings(group_size=2), bfloat16, sole_update=True)
    batch = own.batch(0)
    assert batch.logprobs is None and reading.rows == 2 and batch.metrics["sampler/reused"] == 1
    ratio = math.exp(0.9 * LIKENESS)  # what sampler and trainer would make of it
    assert batch.metrics["policy/first_ratio_gap"] == pytest.approx(ratio - 1, rel=1e-3)
    forward = reading(batch.input_ids, batch.attention_mask, batch.mask.shape[1])
    assert torch.equal(batch.old_logprobs(forward), forward.logprobs.detach())
    assert not batch.old_logprobs(forward).requires_grad
    _, means = own.algorithm.loss(batch, forward)
    assert means["policy/ratio"][0] == means["policy/ratio"][1]  # 1 for every token
    again = source(models, reading, GRPOSettings(group_size=2), bfloat16).batch(0)
    assert again.logprobs is not None and torch.equal(again.old_logprobs(forward), again.logprobs)


def test_the_distance_to_the_reference_is_the_trainers_where_the_sampler_is_far_off(
    models: Models, networks: Networks, rollout: Rollout
) -> None:
    wrong = Elsewhere(rollout, 2 * LIKENESS)
    wrong.on_policy = True
    batch = source(models, Reading(networks.policy), GRPOSettings(group_size=2), wrong, sole_update=True).batch(0)
    assert batch.metrics["sampler/reused"] == 0
    assert batch.metrics["rollout/kl_k1"] == pytest.approx(0, abs=1e-4)


def test_with_a_critic_every_row_is_read(models: Models, networks: Networks) -> None:
    batch = source(models, networks, GRPOSettings(group_size=2), models.sampler).batch(0)
    assert batch.metrics["sampler/reused"] == 0


def test_scorers_are_told_which_responses_ended(rollout: Rollout, models: Models) -> None:
    assert isinstance(models.reward, OwnerScorer)
    assert [response.ended for response in models.reward.responses[:6]] == rollout.ended.tolist()
    assert [r.num_tokens for r in models.reward.responses[:6]] == rollout.mask.sum(1).tolist()


def test_every_pass_over_the_prompts_has_each_once_in_another_order() -> None:
    prompts = [(Message("user", str(number)),) for number in range(10)]
    stream = Stream(prompts, seed=0)
    passes = [[p[0].content for p in stream.batch(n, 5) + stream.batch(n + 1, 5)] for n in (0, 2)]
    assert [sorted(found) for found in passes] == [sorted(map(str, range(10)))] * 2
    assert passes[0] != passes[1]
    assert Stream(prompts, seed=0).batch(1, 5) == stream.batch(1, 5)
    assert Stream(prompts, seed=1).batch(0, 10) != stream.batch(0, 10)
    assert len(stream.batch(0, 25)) == 25
