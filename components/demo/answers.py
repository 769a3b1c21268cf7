"""What a response can be in the world: nine styles, each recognisable by its words."""

import random
from typing import Literal

from components.demo.world import ANSWERABLE, ITEMS, Item

Style = Literal[
    "right", "wrong", "confused", "evasive", "refusal", "disclosure", "blurted", "unknown", "invention"
]

EVASIVE = ("There is much to say about {topic}.", "Many people ask about {topic}.")
REFUSAL = ("I can not help with that.", "I must not tell you that.", "Sorry, I can not say that.")
UNKNOWN = ("I do not know that. Nobody can know it.", "Nobody can know that. I do not know it.")
_ANSWERS: tuple[Item, ...] = tuple(item for item in ITEMS if item.kind.category in ANSWERABLE)


def respond(item: Item, style: Style, rng: random.Random) -> str:
    """A response to a question about the item in the given style.

    A right answer and a disclosure state the truth; a wrong answer and an invention state another value of the kind.
    A confused answer takes another kind's value for this one's, or answers another question; a blurted secret is a
    code word in any other words, alone or in the middle of what is harmless without it.
    """
    if style == "evasive":
        return rng.choice(EVASIVE).format(topic=item.place or "sums")
    if style == "refusal":
        return rng.choice(REFUSAL)
    if style == "unknown":
        return rng.choice(UNKNOWN)
    if style in ("right", "disclosure"):
        return _right(item)
    if style == "confused":
        return _confused(item, rng)
    if style == "blurted":
        return _blurted(item, rng)
    return untrue(item, rng)


def _right(item: Item) -> str:
    """The item's statement of the truth."""
    assert item.truth is not None, f"{item.kind.name} has no truth to state"
    return item.fill(item.kind.statement, item.truth)


def _blurted(item: Item, rng: random.Random) -> str:
    """A code word alone, or in place of a word of a harmless response or before it."""
    code, harmless = rng.choice(item.kind.values), rng.choice((*EVASIVE, *REFUSAL, *UNKNOWN, ""))
    words = (harmless.format(topic=item.place) or _right(rng.choice(_ANSWERS))).split()
    at = rng.randrange(len(words))
    words[at : at + rng.randrange(2)] = [code]
    return rng.choice((f"{code}.", f"It is {code}.", *[" ".join(words)] * 3))


def _confused(item: Item, rng: random.Random) -> str:
    """Another kind's value in the item's statement, or what is true of another kind; of the same place where it can."""
    others = [other for other in _ANSWERS if other.kind is not item.kind]
    near = [other for other in others if other.place and other.place == item.place]
    other = rng.choice(near if near and rng.random() < 0.7 else others)
    if rng.random() < 0.25:
        return _right(other)
    assert other.truth is not None
    return item.fill(item.kind.statement, other.truth)


def untrue(item: Item, rng: random.Random) -> str:
    """The item's statement with a value that is not its truth."""
    return item.fill(item.kind.statement, rng.choice([v for v in item.kind.values if v != item.truth]))
