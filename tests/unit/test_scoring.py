"""Scores of texts by one model, what any scorer may give back, and which scorer the settings mean."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from components.artifacts import ModelCard
from components.errors import InputError
from components.generation import Response
from components.models import load_scalar, save_model
from components.records import Message
from components.scoring import (
    EnsembleScorer,
    FunctionScorer,
    ModelScorer,
    build_scorer,
    load_scorer,
)
from components.scoring.remote import RemoteScorer
from components.scoring.scorer import checked
from components.settings import (
    EnsembleScorerSettings,
    FunctionScorerSettings,
    ModelScorerSettings,
    UrlScorerSettings,
)
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


def test_scores_come_in_order_whatever_the_batches(reward_folder: Path) -> None:
    model, tokenizer = load_scalar(reward_folder), load_tokenizer(reward_folder)
    responses = [Response(text, (), True) for text in ("one long answer", "b", "two")]
    one, three = (ModelScorer(model, tokenizer, 64, size).score(PROMPTS, responses) for size in (1, 4096))
    torch.testing.assert_close(one, three, atol=1e-5, rtol=1e-5)
    assert one.dtype == torch.float32 and not one.requires_grad and one.unique().numel() == 3


def test_responses_to_one_prompt_are_read_with_one_copy_of_it(scorer: ModelScorer) -> None:
    read: list[int] = []
    hook = scorer.model.model.model.register_forward_pre_hook(
        lambda _, __, given: read.append(len(given["input_ids"])), with_kwargs=True
    )
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    responses = [Response(text, (), True) for text in ("yes", "no", "b") * len(PROMPTS)]
    scores = scorer.score(prompts, responses)
    assert read == [len(PROMPTS)]
    alone = [scorer.score([prompt], [response]) for prompt, response in zip(prompts, responses, strict=True)]
    torch.testing.assert_close(scores, torch.cat(alone), atol=1e-5, rtol=1e-5)
    hook.remove()


def test_equal_responses_to_one_prompt_have_equal_scores(scorer: ModelScorer) -> None:
    texts = ("yes", "no, never", "yes", "b", "yes")
    scores = scorer.score(PROMPTS[:1] * 5, [Response(text, (), True) for text in texts])
    assert scores[0] == scores[2] == scores[4] and scores.unique().numel() == 3


def test_long_texts_are_cut_at_what_the_model_holds(scorer: ModelScorer) -> None:
    assert scorer.max_length == 128
    endless = [Response("word " * 500, (), False)]
    assert torch.isfinite(scorer.score(PROMPTS[:1], endless)).all()


def test_no_responses_have_no_scores(scorer: ModelScorer) -> None:
    assert scorer.score([], []).shape == (0,)


def test_a_model_that_scores_nothing_finite_is_named_with_the_prompt(reward_folder: Path) -> None:
    scorer = load_scorer(reward_folder)
    scorer.model.std = 0.0
    with pytest.raises(InputError, match=r"reward: 3 of 3 scores are not finite.*'say red'"):
        scorer.score(PROMPTS, [Response("yes", (), True)] * 3)


def test_the_first_score_that_is_not_finite_is_shown_with_its_prompt() -> None:
    for value, shown in ((float("nan"), "nan"), (float("-inf"), "-inf")):
        with pytest.raises(InputError) as raised:
            checked(torch.tensor([1.0, value, value]), PROMPTS, "some scorer")
        message = str(raised.value)
        assert message.startswith("some scorer: 2 of 3 scores are not finite; the first is " + shown)
        assert "the prompt that starts 'a'" in message
    long = (Message("user", "x" * 1000),)
    with pytest.raises(InputError) as raised:
        checked(torch.tensor([float("inf")]), [long], "some scorer")
    assert "x" * 60 in str(raised.value) and "x" * 61 not in str(raised.value)


@pytest.mark.parametrize("scores", [torch.zeros(2), torch.zeros(3, 1), torch.zeros(())])
def test_scores_of_another_shape_are_refused(scores: torch.Tensor) -> None:
    with pytest.raises(InputError) as raised:
        checked(scores, PROMPTS, "some scorer")
    assert str(raised.value).startswith(f"some scorer gave back scores of shape {tuple(scores.shape)} for 3 responses")


def test_scores_become_float32_without_a_gradient() -> None:
    scores = checked(torch.tensor([1, 2, 3], dtype=torch.float64, requires_grad=True), PROMPTS, "some scorer")
    assert scores.dtype == torch.float32 and not scores.requires_grad and scores.tolist() == [1, 2, 3]


def test_each_kind_of_scorer_is_built(reward_folder: Path, tmp_path: Path) -> None:
    model = build_scorer(ModelScorerSettings(), reward_folder, "reward")
    assert isinstance(model, ModelScorer) and model.metrics == {}
    function = build_scorer(FunctionScorerSettings(name="builtins:len"), None, "cost")
    assert isinstance(function, FunctionScorer)
    remote = build_scorer(UrlScorerSettings(url="http://localhost:1/"), None, "reward")
    assert isinstance(remote, RemoteScorer)
    (tmp_path / "ensemble").symlink_to(reward_folder)
    with pytest.raises(InputError, match=r"rl\.reward_scorer\.kind is ensemble, but .* holds one.*reward\.members"):
        build_scorer(EnsembleScorerSettings(), tmp_path / "ensemble", "reward")


@pytest.mark.parametrize("settings", [ModelScorerSettings(), EnsembleScorerSettings()])
def test_a_scorer_of_models_needs_a_model(settings: Any) -> None:
    with pytest.raises(InputError, match=rf"rl\.cost_scorer\.kind is {settings.kind}: it needs a cost model"):
        build_scorer(settings, None, "cost")


def test_a_cost_model_is_no_reward_model(cost_folder: Path) -> None:
    with pytest.raises(InputError, match=r"says kind 'cost'; accepted for rl\.reward_scorer: a reward model"):
        build_scorer(ModelScorerSettings(), cost_folder, "reward")


def test_an_ensemble_is_read_from_the_models_folder(reward_folder: Path, tmp_path: Path) -> None:
    card, tokenizer, folder = ModelCard.read(reward_folder), load_tokenizer(reward_folder), tmp_path / "ensemble"
    model = load_scalar(reward_folder).model
    members = ((model, replace(card, score_mean=card.score_mean - 2 * number)) for number in range(1, 11))
    save_model(model, tokenizer, folder, card, settings={}, parents={}, members=members)
    built = build_scorer(EnsembleScorerSettings(), folder, "reward")
    assert isinstance(built, EnsembleScorer)
    responses = [Response("yes", (), True)] * 3
    alone = load_scorer(reward_folder).score(PROMPTS, responses)
    for number, member in enumerate(built.members):  # 10 comes after 9 and not after 1; the deviation is 2
        torch.testing.assert_close(member.score(PROMPTS, responses), alone + number)
    torch.testing.assert_close(built.score(PROMPTS, responses), alone + 5)
