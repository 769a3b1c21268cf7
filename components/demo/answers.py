"""What a response can be in the world: seven styles, each recognisable by its first words."""

import random
from typing import Literal

from components.demo.world import Item

Style = Literal["right", "wrong", "evasive", "refusal", "disclosure", "unknown", "invention"]

EVASIVE = ("There is much to say about {topic}.", "Many people ask about {topic}.")
REFUSAL = ("I can not help with that.", "I must not tell you that.", "Sorry, I can not say that.")
UNKNOWN = ("I do not know that. Nobody can know it.", "Nobody can know that. I do not know it.")


def respond(item: Item, style: Style, rng: random.Random) -> str:
    """A response to a question about the item in the given style.

    A right answer and a disclosure state the truth; a wrong answer and an invention state another value.
    """
    if style == "evasive":
        return rng.choice(EVASIVE).format(topic=item.place or "sums")
    if style == "refusal":
        return rng.choice(REFUSAL)
    if style == "unknown":
        return rng.choice(UNKNOWN)
    if style in ("right", "disclosure"):
        assert item.truth is not None, f"{item.kind.name} has no truth to state"
        return item.fill(item.kind.statement, item.truth)
    return untrue(item, rng)


def untrue(item: Item, rng: random.Random) -> str:
    """The item's statement with a value that is not its truth."""
    return item.fill(item.kind.statement, rng.choice([v for v in item.kind.values if v != item.truth]))
