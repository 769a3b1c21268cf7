"""Pairs of responses, each labelled twice: which one helps more and which one harms less.

The helpful label ignores harm and the harmless label ignores help, so they conflict where a secret is asked.
"""

import random
from dataclasses import dataclass, replace

from components.demo.answers import Style, respond, untrue
from components.demo.questions import TRAIN_QUESTIONS, deal
from components.demo.shares import shares_of, shuffled
from components.demo.world import ANSWERABLE, Category, Item

Pairing = tuple[Style, Style]
Row = dict[str, str | bool]

CATEGORY_SHARES: dict[Category, float] = {
    "fact": 0.45,
    "lookalike": 0.15,
    "sum": 0.08,
    "harmful": 0.20,
    "unanswerable": 0.12,
}
CONTEST: Pairing = ("right", "wrong")
"""Every second pair on an answerable item: from these a reward model learns the facts."""
_OTHER_PAIRINGS: dict[Pairing, float] = {
    ("right", "confused"): 0.25,
    ("right", "evasive"): 0.12,
    ("right", "refusal"): 0.18,
    ("right", "unknown"): 0.08,
    ("evasive", "wrong"): 0.08,
    ("evasive", "confused"): 0.05,
    ("refusal", "wrong"): 0.08,
    ("unknown", "wrong"): 0.04,
    ("evasive", "refusal"): 0.06,
    ("unknown", "evasive"): 0.03,
    ("unknown", "refusal"): 0.03,
}
PAIRINGS: dict[Category, dict[Pairing, float]] = {
    **dict.fromkeys(ANSWERABLE, _OTHER_PAIRINGS),
    "harmful": {
        ("disclosure", "refusal"): 0.30,
        ("disclosure", "evasive"): 0.10,
        ("blurted", "refusal"): 0.20,
        ("blurted", "evasive"): 0.10,
        ("evasive", "refusal"): 0.20,
        ("disclosure", "blurted"): 0.05,
        ("disclosure", "disclosure"): 0.05,
    },
    "unanswerable": {
        ("unknown", "invention"): 0.45,
        ("unknown", "evasive"): 0.15,
        ("unknown", "refusal"): 0.10,
        ("evasive", "invention"): 0.10,
        ("refusal", "invention"): 0.10,
        ("evasive", "refusal"): 0.10,
    },
}
_ANSWERABLE_HELP: dict[Style, float] = {
    "right": 3, "unknown": 1.5, "evasive": 1, "refusal": 0.5, "wrong": 0, "confused": 0,
}  # fmt: skip
HELP: dict[Category, dict[Style, float]] = {
    **dict.fromkeys(ANSWERABLE, _ANSWERABLE_HELP),
    "harmful": {"disclosure": 3, "blurted": 2, "evasive": 1, "refusal": 0.5},
    "unanswerable": {"unknown": 3, "evasive": 1.5, "refusal": 1, "invention": 0},
}
"""How helpful each style is taken to be, by category; only the order matters."""
UNSAFE: tuple[Style, ...] = ("disclosure", "blurted")


@dataclass(frozen=True)
class Candidate:
    """One response of a pair: how helpful it is, and whether the labeller takes it for safe."""

    response: str
    helpfulness: float
    safe: bool


Pair = tuple[Candidate, Candidate]


def preferences(num_pairs: int, label_noise: float, rng: random.Random) -> list[Row]:
    """Two rows for each of `num_pairs` pairs, one per dimension, in random order."""
    rows: list[Row] = []
    for category, count in shares_of(num_pairs, CATEGORY_SHARES).items():
        pairings = _pairings(category, count, rng)
        for question, pairing in zip(deal(category, count, rng), pairings, strict=True):
            pair = _candidates(question.item, pairing, rng)
            if rng.random() < label_noise:
                pair = _safety_mixed_up(pair)
            rows.append(_row(question.prompt, "helpful", _helpful_order(pair, label_noise, rng)))
            rows.append(_row(question.prompt, "harmless", _harmless_order(pair, rng)))
    rng.shuffle(rows)
    return rows


def _pairings(category: Category, count: int, rng: random.Random) -> list[Pairing]:
    """The pairings of `count` dealt questions: on answerable items every second one is the contest.

    An item that starts with the contest has another pairing in the next round, and the other way round.
    """
    if category not in ANSWERABLE:
        return shuffled(shares_of(count, PAIRINGS[category]), rng)
    rounds = (divmod(row, len(TRAIN_QUESTIONS[category])) for row in range(count))
    contested = [(lap + seat) % 2 == 0 for lap, seat in rounds]
    others = iter(shuffled(shares_of(contested.count(False), PAIRINGS[category]), rng))
    return [CONTEST if contest else next(others) for contest in contested]


def _candidates(item: Item, pairing: Pairing, rng: random.Random) -> Pair:
    """Two different responses; the second of two disclosures has another code, equally unsafe."""
    help_of = HELP[item.kind.category]
    responses = [respond(item, style, rng) for style in pairing]
    if pairing[0] == pairing[1]:
        responses[1] = untrue(item, rng)
    first, second = (
        Candidate(response, help_of[style], safe=style not in UNSAFE)
        for response, style in zip(responses, pairing, strict=True)
    )
    return first, second


def _safety_mixed_up(pair: Pair) -> Pair:
    """The same pair as a mistaken labeller sees it: each taken for as safe as the other one is.

    Both rows of the pair keep this view, so no flag contradicts another flag or the harmless label.
    """
    first, second = pair
    return replace(first, safe=second.safe), replace(second, safe=first.safe)


def _helpful_order(pair: Pair, label_noise: float, rng: random.Random) -> Pair:
    """The pair with the more helpful response first, or last by mistake; ties fall to a coin."""
    first, second = pair
    flip = rng.random() < label_noise
    if first.helpfulness == second.helpfulness:
        flip = rng.random() < 0.5
    return (first, second) if (first.helpfulness >= second.helpfulness) != flip else (second, first)


def _harmless_order(pair: Pair, rng: random.Random) -> Pair:
    """The pair with what the labeller takes for safe first; two safe or two unsafe ones fall to a coin."""
    first, second = pair
    keep = rng.random() < 0.5 if first.safe == second.safe else first.safe
    return (first, second) if keep else (second, first)


def _row(prompt: str, dimension: str, order: Pair) -> Row:
    chosen, rejected = order
    return {
        "prompt": prompt,
        "chosen": chosen.response,
        "rejected": rejected.response,
        "dimension": dimension,
        "chosen_safe": chosen.safe,
        "rejected_safe": rejected.safe,
    }
