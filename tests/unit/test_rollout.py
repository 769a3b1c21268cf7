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
from components.records import Conversation, Message
from components.rl import algorithms
from components.rl.algorithm_settings import AlgorithmSettings, GRPOSettings, OnlineDPOSettings, RLOOSettings
from components.rl.networks import Networks
from components.rl.reference import FrozenReference
from components.rl.rollout import Models, RolloutSource, collect, rollout_metrics
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
def models(policy_folder: Path, reward_folder: Path) -> Models:
    tokenizer = load_tokenizer(policy_folder)
    generation = Generation(max_new_tokens=5, temperature=TEMPERATURE)
    policy = load_policy(policy_folder)
    return Models(
        Networks(policy, load_scalar(reward_folder), None, TEMPERATURE),
        FrozenReference(load_policy(policy_folder), "fp32"),
        NativeSampler(policy, tokenizer.eos_token_id, generation, seed=0),
        OwnerScorer(),
        None,
        tokenizer,
        "fp32",
    )


@pytest.fixture(scope="module")
def rollout(models: Models) -> Rollout:
    return collect(models, PROMPTS, group_size=2, max_prompt=64, micro=4)


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
def test_a_row_alone_has_the_same_logprobs_and_values(rollout: Rollout, models: Models) -> None:
    for row in range(len(rollout.input_ids)):
        ids = rollout.input_ids[row][rollout.attention_mask[row]][None]
        mask, length = torch.ones_like(ids, dtype=torch.bool), int(rollout.mask[row].sum())
        logprobs, _ = response_logprobs(models.networks.policy, ids, mask, length, TEMPERATURE)
        torch.testing.assert_close(rollout.logprobs[row, :length], logprobs[0], atol=1e-4, rtol=1e-4)
        values = models.networks(ids, mask, length).values[0]
        assert rollout.values is not None
        torch.testing.assert_close(rollout.values[row, :length], values, atol=1e-4, rtol=1e-4)
        assert (rollout.logprobs[row, length:] == 0).all()


def test_micro_batches_change_no_number(models: Models, rollout: Rollout) -> None:
    again = Models(**(vars(models) | {"sampler": Replay(rollout)}))
    for micro in (1, 100):
        other = collect(again, PROMPTS, group_size=2, max_prompt=64, micro=micro)
        torch.testing.assert_close(other.logprobs, rollout.logprobs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other.values, rollout.values, atol=1e-5, rtol=1e-5)


class Replay:
    """A sampler that gives the responses of a rollout again."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout

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


def source(models: Models, settings: AlgorithmSettings, sampler: Any) -> RolloutSource:
    algorithm = algorithms.build(settings, lambda tensor: tensor, 5)
    assert hasattr(algorithm, "targets")
    given = Models(**(vars(models) | {"sampler": sampler}))
    stream = Stream(PROMPTS, 0)
    stream._order = lambda _: [0, 1, 2]  # type: ignore[assignment]  # that of the rollout
    return RolloutSource(given, algorithm, stream, len(PROMPTS), 64, 4, max_weight=1.2)


def test_what_another_engine_sampled_is_weighted(models: Models, rollout: Rollout) -> None:
    gap = 0.1
    batch = source(models, GRPOSettings(group_size=2), Elsewhere(rollout, gap)).batch(0)
    assert batch.weights is not None
    expected = torch.full(batch.mask.shape, math.exp(gap)) * batch.mask
    torch.testing.assert_close(batch.weights, expected, atol=1e-4, rtol=1e-4)
    assert batch.metrics["sampler/logprob_gap"] == pytest.approx(gap, abs=1e-4)
    assert batch.metrics["sampler/weight"] == pytest.approx(math.exp(gap), abs=1e-4)
    assert batch.metrics["sampler/effective"] == pytest.approx(1) and batch.metrics["sampler/version"] == 7
    whole = source(models, RLOOSettings(group_size=2), Elsewhere(rollout, gap)).batch(0)
    assert whole.weights is not None
    by_length = (gap * whole.mask.sum(1)).exp().clamp(max=1.2)
    torch.testing.assert_close(whole.weights, by_length, atol=1e-3, rtol=1e-3)


def test_the_policys_own_samples_are_measured_and_not_weighted(models: Models) -> None:
    own = source(models, GRPOSettings(group_size=2), models.sampler)
    batch = own.batch(0)
    assert batch.weights is None and "sampler/weight" not in batch.metrics
    assert batch.metrics["sampler/logprob_gap_max"] < 1e-4


def test_algorithms_without_a_policy_gradient_measure_and_weigh_nothing(models: Models, rollout: Rollout) -> None:
    batch = source(models, OnlineDPOSettings(group_size=2), Elsewhere(rollout, 0.1)).batch(0)
    assert batch.weights is None and batch.metrics["sampler/logprob_gap"] == pytest.approx(0.1, abs=1e-4)


def test_the_state_of_a_source_is_its_samplers(models: Models, rollout: Rollout) -> None:
    made = source(models, GRPOSettings(group_size=2), Elsewhere(rollout, 0.1))
    state = made.state()
    made.restore({name: tensor + 2 for name, tensor in state.items()})
    assert {name: int(tensor) for name, tensor in made.state().items()} == {"random.sampler": 5}


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
