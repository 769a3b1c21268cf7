"""Traps between text, tokens and log-probabilities: end tokens, off-by-one slices, other tokenizers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from components.artifacts import ModelCard
from components.base import architecture
from components.errors import InputError
from components.generation import Response
from components.generation.native import NativeSampler
from components.models import load_policy, policy_card, save_model, scalar_from_policy
from components.records import Conversation, Message, Preference
from components.rl.algorithm_settings import DPOSettings, PPOSettings, RLOOSettings
from components.rl.algorithms.dpo import DPO
from components.rl.assembly import build_networks
from components.rl.drafts import Models, drafted
from components.rl.pairs import PairLogprobs, PairSource, encode_pairs
from components.rl.reference import FrozenReference
from components.rl.settings import RLSettings
from components.rl.stream import Stream
from components.rl.types import Batch, Forward
from components.settings import Generation
from components.tokens import encode_prompt, encode_response, load_tokenizer

TURNS = (Message("user", "say red"), Message("assistant", "red"), Message("user", "and blue?"))
"""A conversation whose template writes the end-of-sequence token in its middle."""


class Remembering:
    """A scorer that keeps what it was shown."""

    def __init__(self) -> None:
        self.responses: list[Response] = []
        self.metrics: dict[str, float] = {}

    def score(self, prompts: Sequence[Conversation], responses: Sequence[Response]) -> Tensor:
        """Zeros (B,)."""
        self.responses += responses
        return torch.zeros(len(responses))


def models_of(folder: Path, temperature: float = 1.0, **generation: Any) -> Models:
    """A policy that samples and is its own reference."""
    tokenizer, policy = load_tokenizer(folder), load_policy(folder)
    settings = Generation(**({"max_new_tokens": 6, "temperature": temperature} | generation))
    sampler = NativeSampler(policy, tokenizer.eos_token_id, settings, seed=0)
    reference = FrozenReference(load_policy(folder), "fp32")
    return Models(sampler, reference, Remembering(), None, tokenizer, temperature, "fp32")


def test_an_end_token_inside_a_prompt_reaches_the_trainer(policy_folder: Path) -> None:
    models = models_of(policy_folder)
    prompts = [TURNS, (Message("user", "a"),)]
    rollout = drafted(models, prompts, group_size=1, max_prompt=64, micro=8)
    filler = models.tokenizer.eos_token_id
    width = rollout.input_ids.shape[1] - rollout.mask.shape[1]
    for row, prompt in enumerate(prompts):
        ids, real = rollout.input_ids[row, :width], rollout.attention_mask[row, :width]
        assert ids[real].tolist() == encode_prompt(models.tokenizer, prompt)
    by_value = [token for token in rollout.input_ids[0, :width].tolist() if token != filler]
    assert len(by_value) == len(encode_prompt(models.tokenizer, TURNS)) - 1  # what a filter by value would lose


def test_what_is_scored_ends_at_the_first_end_token_and_so_does_what_is_learned(policy_folder: Path) -> None:
    models = models_of(policy_folder, max_new_tokens=8)
    models.sampler.ends = [-1]  # no token
    endless = drafted(models, [TURNS] * 12, group_size=1, max_prompt=64, micro=12)
    sampled = endless.input_ids[:, -endless.mask.shape[1] :]
    eos = int(sampled[0, 2])  # a token that the policy does say becomes the one that ends
    models.sampler.ends, models.sampler.eos = [eos], eos
    models.sampler.generator.manual_seed(0)
    rollout = drafted(models, [TURNS] * 12, group_size=1, max_prompt=64, micro=12)
    scored = models.reward.responses[12:]  # type: ignore[attr-defined]
    assert 1 <= rollout.ended.sum() < 12
    for row, response in enumerate(scored):
        whole = sampled[row].tolist()
        expected = whole[: whole.index(eos) + 1] if eos in whole else whole
        assert list(response.ids) == expected and response.ended == (eos in whole)
        assert rollout.mask[row].sum() == len(expected)  # the end token's own log-probability is learned from
        if response.ended:
            assert rollout.sampled_logprobs[row, len(expected) - 1] < 0


@pytest.fixture
def pair_batch(policy_folder: Path) -> Batch:
    """One labelled pair whose responses begin alike, the rejected one longer."""
    tokenizer = load_tokenizer(policy_folder)
    row = Preference("1", TURNS, "yes, red", "yes, blue it is", "helpful", None, None, "made")
    stream = Stream(encode_pairs([row], tokenizer, 64, 32), 0)
    reference = FrozenReference(load_policy(policy_folder), "fp32")
    filler = tokenizer.eos_token_id
    logprobs = PairLogprobs(lambda: reference, dict(enumerate(stream.rows)), filler, 2)
    return PairSource(stream, logprobs, filler, 1).batch(0)


def token_logprobs(folder: Path, prompt: list[int], response: list[int]) -> list[float]:
    """The log-probability of each response token, by a whole softmax over the unpadded sequence."""
    with torch.no_grad():
        logits = load_policy(folder)(torch.tensor([prompt + response])).logits[0].double()
    return [
        float(logits[len(prompt) + place - 1].log_softmax(-1)[token]) for place, token in enumerate(response)
    ]


def test_a_preference_counts_the_first_difference_and_the_end_token_and_no_padding(
    policy_folder: Path, pair_batch: Batch
) -> None:
    tokenizer = load_tokenizer(policy_folder)
    prompt = encode_prompt(tokenizer, TURNS)
    responses = [encode_response(tokenizer, text) for text in ("yes, red", "yes, blue it is")]
    each = [token_logprobs(policy_folder, prompt, response) for response in responses]
    first = next(place for place, (a, b) in enumerate(zip(*responses, strict=False)) if a != b)
    assert first > 1 and len(responses[0]) < len(responses[1])
    ref_logprobs = pair_batch.ref_logprobs
    assert ref_logprobs is not None
    margin = float(ref_logprobs[0].sum() - ref_logprobs[1].sum())
    from_difference = [sum(logprobs[first:]) for logprobs in each]  # what comes before cancels out
    assert margin == pytest.approx(from_difference[0] - from_difference[1], abs=1e-3)
    one_late = [sum(logprobs[first + 1 :]) for logprobs in each]  # safe-rlhf's slice of shifted log-probabilities
    assert abs(margin - (one_late[0] - one_late[1])) > 0.05
    without_end = [sum(logprobs[:-1]) for logprobs in each]
    assert abs(margin - (without_end[0] - without_end[1])) > 0.05


def test_dpo_learns_from_the_first_difference_and_not_from_padding(pair_batch: Batch) -> None:
    logprobs = torch.zeros(2, pair_batch.mask.shape[1], requires_grad=True)
    total, _ = DPO(DPOSettings()).loss(pair_batch, Forward(logprobs, torch.zeros_like(logprobs)))
    total.backward()
    assert logprobs.grad is not None
    assert (logprobs.grad[0][pair_batch.mask[0]] < 0).all()  # every token of the chosen response becomes likelier
    assert (logprobs.grad[1][pair_batch.mask[1]] > 0).all()
    assert (logprobs.grad[~pair_batch.mask] == 0).all() and (~pair_batch.mask).any()


@pytest.fixture
def foreign_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reward model of another family: another tokenizer, another template."""
    monkeypatch.setitem(architecture.SIZES, "1m", (32, 2, 2, 1, 64))
    texts = ["some other text with other words in it, of another family and for another purpose altogether"] * 2
    tokenizer = architecture.train_tokenizer(texts, 320)
    tokenizer.chat_template = "Q: {{ messages[-1].content }}\nA: "
    torch.manual_seed(3)
    model = architecture.untrained_llama("1m", tokenizer, 128)
    save_model(model, tokenizer, tmp_path / "base", policy_card("", "sft", tokenizer), settings={}, parents={})
    scalar = scalar_from_policy(tmp_path / "base")
    torch.nn.init.normal_(scalar.model.score.weight)
    card = ModelCard("reward", "", "reward", "")
    save_model(scalar.model, tokenizer, tmp_path / "foreign", card, settings={}, parents={})
    return tmp_path / "foreign"


def test_a_critic_that_would_read_the_policy_s_tokens_by_another_vocabulary_is_refused(
    policy_folder: Path, foreign_folder: Path, reward_folder: Path
) -> None:
    with pytest.raises(InputError, match=r"foreign: its vocabulary is not that of the policy.*share_backbone"):
        build_networks(RLSettings(algorithm=PPOSettings()), policy_folder, foreign_folder, None)
    build_networks(RLSettings(algorithm=PPOSettings()), policy_folder, reward_folder, None)
    build_networks(RLSettings(algorithm=PPOSettings(), share_backbone=True), policy_folder, foreign_folder, None)
    build_networks(RLSettings(algorithm=RLOOSettings()), policy_folder, foreign_folder, None)
