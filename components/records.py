"""The three kinds of row that flow through plumbline, and how a row explains what is wrong with it.

A prompt is a conversation: a tuple of messages that ends with the user's. A plain string is one user message.
"""

import hashlib
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from components.errors import InputError

ROLES = ("system", "user", "assistant")
Dimension = Literal["helpful", "harmless"]
DIMENSIONS: tuple[Dimension, ...] = ("helpful", "harmless")
KINDS = ("demonstrations", "preferences", "prompts")
SPLITS = ("train", "test")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the response to imitate."""

    id: str
    prompt: Conversation
    response: str
    source: str

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str) -> Self:
        """The demonstration in a row of a table. Raises InputError naming `where` and the field."""
        return cls(row["id"], parse_prompt(row, where), text_field(row, "response", where), row["source"])


@dataclass(frozen=True, slots=True)
class Preference:
    """Two responses to one prompt, ordered along one dimension; safety flags where somebody set them."""

    id: str
    prompt: Conversation
    chosen: str
    rejected: str
    dimension: Dimension
    chosen_safe: bool | None
    rejected_safe: bool | None
    source: str

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str) -> Self:
        """The preference in a row of a table. Raises InputError naming `where` and the field."""
        dimension = row.get("dimension")
        if dimension not in DIMENSIONS:
            raise InputError(f"{where}: field 'dimension' is {dimension!r}; accepted: helpful, harmless.")
        return cls(
            row["id"],
            parse_prompt(row, where),
            text_field(row, "chosen", where),
            text_field(row, "rejected", where),
            dimension,
            flag_field(row, "chosen_safe", where),
            flag_field(row, "rejected_safe", where),
            row["source"],
        )


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to answer, with its category where one is known (fact, harmful, ...)."""

    id: str
    prompt: Conversation
    source: str
    category: str | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str) -> Self:
        """The prompt in a row of a table. Raises InputError naming `where` and the field."""
        category = row.get("category")
        if category is not None and not isinstance(category, str):
            raise InputError(f"{where}: field 'category' is {category!r}; accepted: a string, or absent.")
        return cls(row["id"], parse_prompt(row, where), row["source"], category)


Record = Demonstration | Preference | Prompt
RECORD_TYPES: dict[str, type[Demonstration] | type[Preference] | type[Prompt]] = {
    "demonstrations": Demonstration,
    "preferences": Preference,
    "prompts": Prompt,
}


def to_row(record: Record) -> dict[str, Any]:
    """The record as plain values, ready for a table."""
    row = asdict(record)
    row["prompt"] = [asdict(message) for message in record.prompt]
    return row


def text_field(row: Mapping[str, Any], field: str, where: str) -> str:
    """The string in `field`. Raises InputError when it is missing or of another type."""
    value = row.get(field)
    if isinstance(value, str):
        return value
    seen = "missing" if value is None else f"{_short(value)} ({type(value).__name__})"
    raise InputError(f"{where}: field '{field}' is {seen}; accepted: a string.")


def flag_field(row: Mapping[str, Any], field: str, where: str) -> bool | None:
    """The boolean in `field`, None when absent. Raises InputError for any other type."""
    value = row.get(field)
    if value is None or isinstance(value, bool):
        return value
    raise InputError(f"{where}: field '{field}' is {_short(value)}; accepted: true, false, or absent.")


def parse_prompt(row: Mapping[str, Any], where: str, field: str = "prompt") -> Conversation:
    """The conversation in `field`: a string (one user message) or a list of {role, content} messages.

    Raises InputError when it is missing, of another type, or has an unknown role.
    """
    value = row.get(field)
    if isinstance(value, str):
        return (Message("user", value),)
    if value is None or isinstance(value, Mapping | int | float | bool):
        seen = "missing" if value is None else _short(value)
        raise InputError(f"{where}: field '{field}' is {seen}; accepted: a string or a list of messages.")
    messages = []
    for turn in value:
        if not isinstance(turn, Mapping) or turn.get("role") not in ROLES:
            raise InputError(
                f"{where}: field '{field}' has a turn {_short(turn)}; accepted: "
                f'{{"role": one of {", ".join(ROLES)}, "content": "..."}}.'
            )
        messages.append(Message(turn["role"], text_field(turn, "content", f"{where}: field '{field}'")))
    return tuple(messages)


def prompt_text(prompt: Conversation) -> str:
    """The conversation as one string: the message itself when there is one, else a line per turn."""
    if len(prompt) == 1:
        return prompt[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in prompt)


def normalized(prompt: Conversation) -> str:
    """The prompt as it is compared for duplicates and leakage: NFKC, lower case, white space folded."""
    text = "\x1e".join(f"{message.role}\x1f{message.content}" for message in prompt)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def content_id(*parts: object) -> str:
    """A 16-digit identifier that depends on the content alone."""
    return hashlib.sha256("\x1e".join(map(str, parts)).encode()).hexdigest()[:16]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
