"""Drafts by several processes, threads in their place: the same responses, scores and log-probabilities as by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from components.generation import Response, Samples
from components.generation.native import NativeSampler
from components.models import load_policy
from components.ranks import ALONE
from components.records import Message, Preference
from components.rl.drafts import Models
from components.rl.networks import Networks
from components.rl.pairs import PairLogprobs, encode_pairs
from components.rl.reference import FrozenReference
from components.rl.rollout import read
from components.rl.shares import SharedReference, SharedSampler, SharedScorer, own_rows, shared
from components.scoring import load_scorer
from components.settings import Generation
from threaded import Threads, in_threads

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14], [15, 16]]


@pytest.fixture(scope="module")
def policy(policy_folder: Path) -> Any:
    return load_policy(policy_folder)


def sampler_of(policy: Any) -> NativeSampler:
    return NativeSampler(policy, 2, Generation(max_new_tokens=7), seed=3)


def same(one: Samples, other: Samples) -> None:
    """The same tokens and log-probabilities where there are tokens; what fills up is nobody's."""
    assert torch.equal(one.mask, other.mask) and torch.equal(one.ended, other.ended)
    assert torch.equal(one.ids[one.mask], other.ids[other.mask])
    torch.testing.assert_close(one.logprobs, other.logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_each_process_samples_what_one_would_have_sampled(policy: Any, size: int) -> None:
    alone = sampler_of(policy)
    expected = [alone.sample(PROMPTS, 2) for _ in range(2)]

    def sampled(ranks: Threads) -> tuple[list[Samples], Tensor]:
        sampler = SharedSampler(sampler_of(policy), policy, ranks)
        return [sampler.sample(PROMPTS, 2) for _ in range(2)], sampler.state()

    for found, state in in_threads(size, sampled):
        for one, other in zip(expected, found, strict=True):
            same(one, other)
        assert torch.equal(state, alone.state())


class Lengths:
    """Scores a response by its length, and says what it saw."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def score(self, prompts: Any, responses: Any) -> Tensor:
        scores = torch.tensor([float(len(response.text)) for response in responses])
        self.metrics = {"rollout/mean": float(scores.mean())}
        return scores


@pytest.mark.parametrize("size", [2, 4])
def test_scores_come_back_in_order_and_their_numbers_are_means_over_all_rows(size: int) -> None:
    responses = [Response("x" * length, (1,), True) for length in (1, 2, 4)]

    def scored(ranks: Threads) -> tuple[list[float], dict[str, float]]:
        scorer = SharedScorer(Lengths(), ranks)
        return scorer.score([()] * 3, responses).tolist(), scorer.metrics

    for scores, metrics in in_threads(size, scored):
        assert scores == [1.0, 2.0, 4.0] and metrics == {"rollout/mean": pytest.approx(7 / 3)}


@pytest.mark.parametrize("size", [2, 3])
def test_models_share_their_batches_and_make_as_many_passes_each(
    reward_folder: Path, policy: Any, size: int
) -> None:
    """A guest on divided weights needs all processes in every pass; rows of all lengths make batches of all sizes."""
    responses = [Response("yes " * length, (1,), True) for length in (1, 9, 2, 2, 30, 4, 17)]
    prompts = [(Message("user", "say " + "so " * (number % 3)),) for number in range(len(responses))]
    expected = load_scorer(reward_folder).score(prompts, responses)

    loaded = [load_scorer(reward_folder) for _ in range(size)]  # transformers cannot load in threads

    def scored(ranks: Threads) -> tuple[Tensor, int]:
        scorer, passes = loaded[ranks.rank], list[int]()
        scorer.ranks, scorer.batch_tokens = ranks, 64
        scorer.model.register_forward_hook(lambda *_: passes.append(1))  # type: ignore[attr-defined]
        models = Models(sampler_of(policy), FrozenReference(policy, "fp32"), scorer, None, None, 1.0, "fp32")  # type: ignore[arg-type]
        return shared(models, policy, ranks).reward.score(prompts, responses), len(passes)

    found = in_threads(size, scored)
    for scores, _ in found:
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    (passes,) = {passes for _, passes in found}
    assert 1 < passes < len(responses)


def test_rows_are_shared_out_without_a_gap() -> None:
    parts = in_threads(3, lambda ranks: own_rows(8, ranks))
    assert [row for part in parts for row in range(8)[part]] == list(range(8))
    assert [part.stop - part.start for part in parts] == [2, 3, 3]


def test_reference_and_networks_are_read_in_parts_with_the_same_result(policy: Any, draft: Any) -> None:
    given = draft.input_ids, draft.attention_mask, draft.mask.shape[1], 1.0
    parts = [torch.tensor(rows) for rows in ([3, 0], [1, 4], [2])]
    expected = FrozenReference(policy, "fp32").logprobs(*given, parts)
    networks = Networks(policy)
    whole, _ = read(networks, draft, 2)

    def told(ranks: Threads) -> tuple[Tensor, Tensor]:
        reference = SharedReference(FrozenReference(policy, "fp32"), ranks)
        return reference.logprobs(*given, parts), read(networks, draft, 2, ranks=ranks)[0].logprobs

    for reference, logprobs in in_threads(2, told):
        torch.testing.assert_close(reference, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logprobs, whole.logprobs, rtol=1e-4, atol=1e-5)


@pytest.fixture
def draft(policy: Any) -> Any:
    from components.rl.drafts import Draft
    from components.tokens import pad

    samples = sampler_of(policy).sample(PROMPTS)
    ids, mask = pad(PROMPTS, 2, side="left")
    zeros = torch.zeros(len(PROMPTS))
    return Draft(
        torch.cat([ids, samples.ids], 1), torch.cat([mask, samples.mask], 1), samples.mask, samples.logprobs,
        torch.zeros_like(samples.logprobs), zeros, None, samples.ended, 1, {},
    )  # fmt: skip


def test_what_the_reference_says_of_pairs_is_read_in_parts(policy: Any, tokenizer: Any) -> None:
    words = ("yes", "no, never", "yes, seven it is", "no")
    rows = [Preference(w, (Message("user", w),), w, "no", "helpful", None, None, "made") for w in words]
    pairs = dict(enumerate(encode_pairs(rows, tokenizer, 16, 8)))

    def said(ranks: Any) -> list[tuple[Tensor, Tensor]]:
        logprobs = PairLogprobs(lambda: FrozenReference(policy, "fp32"), pairs, 2, 2, ranks=ranks)
        return [logprobs.of(index) for index in pairs]

    expected = said(ALONE)
    for found in in_threads(3, said):
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_one_process_uses_the_models_as_they_are(policy: Any) -> None:
    reference, scorer = FrozenReference(policy, "fp32"), Lengths()
    models = Models(sampler_of(policy), reference, scorer, None, None, 1.0, "fp32")  # type: ignore[arg-type]
    assert shared(models, policy, ALONE) is models
    (divided,) = {type(m.sampler) for m in in_threads(2, lambda ranks: shared(models, policy, ranks))}
    assert divided is SharedSampler
