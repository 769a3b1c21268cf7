"""Scores of texts: a model's own tokenizer and template, whatever sampled them."""

from pathlib import Path

import pytest
import torch

from components.generation import Response
from components.models import load_scalar
from components.records import Message
from components.scoring import ModelScorer, load_scorer
from components.tokens import encode_prompt, encode_response, load_tokenizer

PROMPTS = [(Message("user", text),) for text in ("say red", "a", "say seven three north and more")]


@pytest.fixture(scope="module")
def scorer(reward_folder: Path) -> ModelScorer:
    return load_scorer(reward_folder)


def by_hand(folder: Path, ids: list[int]) -> float:
    with torch.no_grad():
        return load_scalar(folder).score(torch.tensor([ids]), torch.ones(1, len(ids)).bool()).item()


@pytest.mark.parametrize("ended", [True, False])
def test_a_response_carries_the_end_token_only_if_it_ended(
    ended: bool, scorer: ModelScorer, reward_folder: Path
) -> None:
    tokenizer = load_tokenizer(reward_folder)
    scores = scorer.score(PROMPTS, [Response(text, (), ended) for text in ("yes", "", "no, never 🙂")])
    for score, prompt, text in zip(scores, PROMPTS, ("yes", "", "no, never 🙂"), strict=True):
        ids = encode_prompt(tokenizer, prompt) + encode_response(tokenizer, text, ended)
        assert score.item() == pytest.approx(by_hand(reward_folder, ids), abs=1e-4)


def test_scores_come_in_order_whatever_the_batch_size(reward_folder: Path) -> None:
    model, tokenizer = load_scalar(reward_folder), load_tokenizer(reward_folder)
    responses = [Response(text, (), True) for text in ("one long answer", "b", "two")]
    one, three = (ModelScorer(model, tokenizer, 64, size).score(PROMPTS, responses) for size in (1, 3))
    torch.testing.assert_close(one, three, atol=1e-5, rtol=1e-5)
    assert one.dtype == torch.float32 and not one.requires_grad and one.unique().numel() == 3


def test_long_texts_are_cut_at_what_the_model_holds(scorer: ModelScorer) -> None:
    assert scorer.max_length == 128
    endless = [Response("word " * 500, (), False)]
    assert torch.isfinite(scorer.score(PROMPTS[:1], endless)).all()


def test_no_responses_have_no_scores(scorer: ModelScorer) -> None:
    assert scorer.score([], []).shape == (0,)
