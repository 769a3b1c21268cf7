"""Labelled pairs as batches: every response token counts once, and a batch changes no number of a pair."""

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from components.checkpoints import TENSORS, Checkpoints
from components.models import load_policy
from components.phases import Phases
from components.records import Message, Preference
from components.rl.algorithm_settings import DPOSettings
from components.rl.algorithms.dpo import DPO
from components.rl.networks import Networks
from components.rl.pairs import EncodedPair, PairLogprobs, PairSource, encode_pairs, pairs_digest
from components.rl.reference import FrozenReference
from components.rl.stream import Stream
from components.tokens import encode_prompt, encode_response


def preference(number: int, prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference(str(number), (Message("user", prompt),), chosen, rejected, "helpful", None, None, "made")


ROWS = [
    preference(0, "say red", "yes, red", "no"),
    preference(1, "a", "yes", "yes, never the word north"),
    preference(2, "say seven three north", "no, never red", "no, never blue"),
]


@pytest.fixture(scope="module")
def reference(policy_folder: Path) -> FrozenReference:
    return FrozenReference(load_policy(policy_folder), "fp32")


@pytest.fixture(scope="module")
def pairs(tokenizer: Any) -> list[EncodedPair]:
    return encode_pairs(ROWS, tokenizer, 64, 64)


def source(
    pairs: list[EncodedPair],
    reference: Any,
    tokenizer: Any,
    size: int = 3,
    micro: int = 4,
    kept: Checkpoints | None = None,
    phases: Phases | None = None,
) -> PairSource:
    filler = tokenizer.eos_token_id
    logprobs = PairLogprobs(lambda: reference, dict(enumerate(pairs)), filler, micro, kept, phases)
    return PairSource(Stream(pairs, 0), logprobs, filler, size)


@torch.no_grad()
def naive_logprobs(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """Log-probabilities of a response's tokens from the whole softmax of the pair alone, in float64."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double()
    every = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(prompt + response)[1:, None])[:, 0]
    return every[len(prompt) - 1 :]


def test_responses_end_with_the_end_token_and_prompts_are_the_template_s(tokenizer: Any) -> None:
    (pair,) = encode_pairs(ROWS[:1], tokenizer, 64, 64)
    assert pair.prompt == encode_prompt(tokenizer, ROWS[0].prompt)
    assert pair.chosen == encode_response(tokenizer, "yes, red") and pair.chosen[-1] == tokenizer.eos_token_id
    assert pair.rejected == encode_response(tokenizer, "no") and pair.cut == 0


def test_prompts_keep_their_last_tokens_and_responses_their_first(tokenizer: Any) -> None:
    whole = encode_pairs(ROWS[:2], tokenizer, 64, 64)
    lengths = [len(response) for pair in whole for response in (pair.chosen, pair.rejected)]
    limit = sorted(lengths)[1]  # two of the four fit exactly or better
    cut = encode_pairs(ROWS[:2], tokenizer, 3, limit)
    for short, full in zip(cut, whole, strict=True):
        assert short.prompt == full.prompt[-3:]
        assert short.chosen == full.chosen[:limit] and short.rejected == full.rejected[:limit]
    assert [pair.cut for pair in cut] == [
        sum(length > limit for length in lengths[:2]), sum(length > limit for length in lengths[2:])
    ]  # fmt: skip
    assert sum(pair.cut for pair in cut) == sum(length > limit for length in lengths) > 0


def test_a_batch_has_chosen_and_rejected_in_turn(pairs: Any, reference: Any, tokenizer: Any) -> None:
    batch = source(pairs, reference, tokenizer).batch(0)
    assert (batch.unit, len(batch)) == (2, 6)
    assert batch.logprobs is None and batch.advantages is None
    seen = []
    width = batch.mask.shape[1]
    for row in range(6):
        prompt = batch.input_ids[row, :-width][batch.attention_mask[row, :-width]].tolist()
        response = batch.input_ids[row, -width:][batch.mask[row]].tolist()
        assert torch.equal(batch.attention_mask[row, -width:], batch.mask[row])
        seen.append((prompt, response))
    expected = [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
    assert sorted((seen[i][0], seen[i][1], seen[i + 1][1]) for i in (0, 2, 4)) == sorted(expected)
    assert all(seen[i][0] == seen[i + 1][0] for i in (0, 2, 4))


@pytest.mark.parametrize("micro", [1, 4, 100])
def test_a_pair_has_the_logprobs_it_has_alone(pairs: Any, reference: Any, tokenizer: Any, micro: int) -> None:
    batch = source(pairs, reference, tokenizer, micro=micro).batch(0)
    assert batch.ref_logprobs is not None and not batch.ref_logprobs.requires_grad
    width = batch.mask.shape[1]
    for row in range(6):
        prompt = batch.input_ids[row, :-width][batch.attention_mask[row, :-width]].tolist()
        response = batch.input_ids[row, -width:][batch.mask[row]].tolist()
        naive = naive_logprobs(reference.model, prompt, response)
        found = batch.ref_logprobs[row]
        torch.testing.assert_close(found[: len(response)].double(), naive, atol=1e-4, rtol=1e-4)
        assert (found[len(response) :] == 0).all()


def test_the_reference_is_in_memory_only_while_it_reads(pairs: Any, reference: Any, tokenizer: Any) -> None:
    made: list[weakref.ref[FrozenReference]] = []

    def build() -> FrozenReference:
        built = FrozenReference(reference.model, "fp32")
        made.append(weakref.ref(built))
        return built

    logprobs = PairLogprobs(build, dict(enumerate(pairs)), tokenizer.eos_token_id, 4)
    assert not made
    assert all(logprobs.of(index) for index in range(len(pairs)))
    assert [found() for found in made] == [None]


def other_policy(policy_folder: Path) -> Any:
    """A policy that differs from the reference everywhere."""
    policy = load_policy(policy_folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return policy


def test_the_margin_counts_from_the_first_difference_to_the_end_token_and_no_padding(
    pairs: Any, reference: Any, tokenizer: Any, policy_folder: Path
) -> None:
    # safe-rlhf's slice is off by one: it leaves out the first differing token and takes in the padding after the end.
    policy = other_policy(policy_folder)
    batch = source(pairs, reference, tokenizer).batch(0)
    with torch.no_grad():
        forward = Networks(policy)(batch.input_ids, batch.attention_mask, batch.mask.shape[1])
    algorithm = DPO(DPOSettings(beta=1.0))
    total, means = algorithm.loss(batch, forward)
    margins = []
    for pair in pairs:
        pairwise = zip(pair.chosen, pair.rejected, strict=False)
        first = next(place for place, (one, other) in enumerate(pairwise) if one != other)
        ratios = [
            (naive_logprobs(policy, pair.prompt, ids) - naive_logprobs(reference.model, pair.prompt, ids))[first:].sum()
            for ids in (pair.chosen, pair.rejected)
        ]
        margins.append(float(ratios[0] - ratios[1]))
    shared = [len(pair.chosen) > 3 and pair.chosen[:3] == pair.rejected[:3] for pair in pairs]
    assert any(shared)  # one pair begins alike, and what it begins with must cancel
    assert means["policy/margin"] == pytest.approx((sum(margins), 3), rel=1e-3, abs=1e-3)
    assert total.item() == pytest.approx(sum(math.log(1 + math.exp(-margin)) for margin in margins), rel=1e-3)


def test_at_the_reference_nothing_is_preferred(pairs: Any, reference: Any, tokenizer: Any) -> None:
    batch = source(pairs, reference, tokenizer).batch(0)
    with torch.no_grad():
        forward = Networks(reference.model)(batch.input_ids, batch.attention_mask, batch.mask.shape[1])
    total, means = DPO(DPOSettings()).loss(batch, forward)
    assert total.item() == pytest.approx(3 * math.log(2), rel=1e-5)
    assert means["policy/margin"] == pytest.approx((0, 3), abs=1e-4)


def test_batches_follow_from_their_number_and_pass_over_every_pair(tokenizer: Any, reference: Any) -> None:
    many = [EncodedPair([number + 10], [20, 1], [21, 1], number % 2) for number in range(6)]

    def made() -> PairSource:
        return source(many, reference, tokenizer, size=2)

    def prompts(found: PairSource, number: int) -> list[int]:
        return found.batch(number).input_ids[0::2, 0].tolist()  # type: ignore[no-any-return]

    fresh = [prompts(made(), number) for number in range(6)]
    going_on = made()
    assert fresh == [prompts(going_on, number) for number in range(6)]
    for first in (0, 3):
        assert sorted(number for batch in fresh[first : first + 3] for number in batch) == list(range(10, 16))
    assert going_on.rows_per_batch == 4
    assert going_on.state()() == {}


def test_what_a_batch_of_pairs_measures(tokenizer: Any, reference: Any) -> None:
    made = [EncodedPair([10], [20, 1], [21, 22, 23, 1], 1), EncodedPair([10], [20, 20], [21, 1], 2)]
    metrics = source(made, reference, tokenizer, size=2).batch(2).metrics
    assert metrics == {"data/passes": 3.0, "data/cut_responses": 3 / 4, "data/length": (2 + 4 + 2 + 2) / 4}


class Counted:
    """A reference that counts the rows it reads."""

    def __init__(self, inner: FrozenReference) -> None:
        self.inner, self.rows = inner, 0

    def logprobs(self, input_ids: Tensor, *rest: Any) -> Tensor:
        self.rows += len(input_ids)
        return self.inner.logprobs(input_ids, *rest)


def ref_logprobs(found: PairSource, batches: int) -> list[Tensor]:
    values = [found.batch(number).ref_logprobs for number in range(batches)]
    return [value for value in values if value is not None]


def test_the_reference_is_timed_when_it_reads_and_by_what_it_reads(pairs: Any, reference: Any, tokenizer: Any) -> None:
    phases = Phases()
    found = source(pairs, reference, tokenizer, phases=phases)
    found.batch(0)
    metrics = phases.lap()
    tokens = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
    assert metrics["perf/reference_s"] * metrics["perf/reference_tokens_per_s"] == pytest.approx(tokens)
    found.batch(1)
    assert phases.lap().keys() == {"perf/other_s", "perf/seconds"}


def test_the_reference_reads_every_pair_once_whatever_the_passes(pairs: Any, reference: Any, tokenizer: Any) -> None:
    counted = Counted(reference)
    found = source(pairs, counted, tokenizer, size=2)
    assert counted.rows == 0  # not before the first batch is asked for
    assert len(ref_logprobs(found, 6)) == 6 and counted.rows == 6


def test_a_later_start_reads_what_an_earlier_one_kept_to_the_bit(
    pairs: Any, reference: Any, tokenizer: Any, tmp_path: Path
) -> None:
    def start() -> tuple[list[Tensor], int]:
        counted = Counted(reference)
        kept = Checkpoints(tmp_path / "kept", 0, work={"pairs": pairs_digest(pairs)})
        return ref_logprobs(source(pairs, counted, tokenizer, size=2, kept=kept), 3), counted.rows

    (first, computed), (second, read) = start(), start()
    assert (computed, read) == (6, 0)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("harm", ["damaged", "foreign", "unwritable"])
def test_what_cannot_be_used_is_computed_again_with_a_warning(
    harm: str, pairs: Any, reference: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "kept"
    expected = ref_logprobs(source(pairs, reference, tokenizer, kept=Checkpoints(place, 0, work={"a": 1})), 1)
    if harm == "damaged":
        (file,) = place.rglob(TENSORS)
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    elif harm == "unwritable":
        place = tmp_path / "file" / "kept"
        place.parent.write_text("in the way")
    counted = Counted(reference)
    work = {"a": 2 if harm == "foreign" else 1}
    caplog.clear()
    found = ref_logprobs(source(pairs, counted, tokenizer, kept=Checkpoints(place, 0, work=work)), 1)
    assert counted.rows == 6 and torch.equal(found[0], expected[0])
    assert [record.levelname for record in caplog.records if record.levelname == "WARNING"]
    if harm != "unwritable":  # and it is kept anew
        again = Counted(reference)
        ref_logprobs(source(pairs, again, tokenizer, kept=Checkpoints(place, 0, work=work)), 1)
        assert again.rows == 0


def test_the_digest_of_pairs_tells_every_token_and_border() -> None:
    made = [
        [EncodedPair([1], [2, 3], [4], 0)],
        [EncodedPair([1], [2], [3, 4], 0)],
        [EncodedPair([1, 2], [3], [4], 0)],
        [EncodedPair([1], [2, 3], [5], 0)],
        [EncodedPair([1], [2, 3], [4], 0)] * 2,
    ]
    assert len({pairs_digest(pairs) for pairs in made}) == len(made)
    assert pairs_digest(made[0]) == pairs_digest([EncodedPair([1], [2, 3], [4], 1)])  # how many were cut is no token
