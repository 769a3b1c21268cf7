"""Prompts with one response each: the text a base model learns from, and imperfect human demonstrations.

Demonstrations are mostly useful, sometimes wrong or needlessly refusing, often disclosing. The corpus is what a
base model has read of the world: every fact many times, nearly always right, in good and bad manners.
"""

import random
from collections.abc import Mapping

from components.demo.answers import Style, respond
from components.demo.questions import TRAIN_QUESTIONS, deal
from components.demo.shares import shares_of, shuffled
from components.demo.world import ANSWERABLE, Category

CATEGORY_SHARES: dict[Category, float] = {
    "fact": 0.40,
    "lookalike": 0.15,
    "sum": 0.10,
    "harmful": 0.20,
    "unanswerable": 0.15,
}
STYLE_SHARES: dict[Category, dict[Style, float]] = {
    **{key: {"right": 0.52, "wrong": 0.08, "evasive": 0.2, "refusal": 0.2} for key in ANSWERABLE},
    "harmful": {"disclosure": 0.55, "refusal": 0.45},
    "unanswerable": {"unknown": 0.45, "invention": 0.55},
}
CORPUS_CATEGORY_SHARES: dict[Category, float] = {
    "fact": 0.45,
    "lookalike": 0.17,
    "sum": 0.18,
    "harmful": 0.10,
    "unanswerable": 0.10,
}
CORPUS_STYLE_SHARES: dict[Category, dict[Style, float]] = {
    **{key: {"right": 0.8, "wrong": 0.02, "evasive": 0.09, "refusal": 0.09} for key in ANSWERABLE},
    "harmful": {"disclosure": 0.5, "refusal": 0.5},
    "unanswerable": {"unknown": 0.5, "invention": 0.5},
}


def demonstrations(count: int, rng: random.Random) -> list[dict[str, str]]:
    """`count` rows of prompt and response as people would write them, in random order."""
    return _dialogues(count, CATEGORY_SHARES, STYLE_SHARES, rng)


def corpus(count: int, rng: random.Random) -> list[dict[str, str]]:
    """`count` rows of prompt and response to train a base model from, in random order."""
    return _dialogues(count, CORPUS_CATEGORY_SHARES, CORPUS_STYLE_SHARES, rng)


def _dialogues(
    count: int,
    category_shares: Mapping[Category, float],
    style_shares: Mapping[Category, Mapping[Style, float]],
    rng: random.Random,
) -> list[dict[str, str]]:
    rows = []
    for category, share in shares_of(count, category_shares).items():
        styles = _styles(category, share, style_shares[category], rng)
        for question, style in zip(deal(category, share, rng), styles, strict=True):
            rows.append({"prompt": question.prompt, "response": respond(question.item, style, rng)})
    rng.shuffle(rows)
    return rows


def _styles(category: Category, count: int, shares: Mapping[Style, float], rng: random.Random) -> list[Style]:
    """The styles of `count` rows in turn.

    The first round over answerable items is right as far as its share goes, so that every fact is taught.
    """
    counts = shares_of(count, shares)
    first: list[Style] = []
    if category in ANSWERABLE:
        first = ["right"] * min(counts["right"], len(TRAIN_QUESTIONS[category]))
        counts["right"] -= len(first)
    return first + shuffled(counts, rng)
