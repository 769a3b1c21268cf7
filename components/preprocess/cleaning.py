"""From what a row says to a clean record: one form of unicode and white space, nothing empty, an id."""

import re
import unicodedata

from components.preprocess.dropped import LeftOut
from components.preprocess.formats import Example
from components.records import (
    Conversation,
    Demonstration,
    Dimension,
    Message,
    Preference,
    Prompt,
    Record,
    content_id,
    normalized,
)

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n){2,}")
_SURROGATES = re.compile(r"[\ud800-\udfff]")


def clean_text(text: str) -> str:
    """The text in NFC with LF line ends, no white space around it, and at most one blank line in a row.

    Half a surrogate pair, as cut emoji leave it in JSON, is no character: it becomes U+FFFD.
    """
    text = _SURROGATES.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _BLANK_LINES.sub("\n\n", unicodedata.normalize("NFC", text)).strip()


def clean_prompt(prompt: Conversation) -> Conversation:
    """The conversation with clean turns; an empty system message goes.

    Raises LeftOut when another turn is empty.
    """
    turns = [Message(turn.role, clean_text(turn.content)) for turn in prompt]
    kept = tuple(turn for turn in turns if turn.content or turn.role != "system")
    if not kept or not all(turn.content for turn in kept):
        raise LeftOut("empty")
    return kept


def to_record(example: Example, kind: str, default: Dimension, source: str) -> Record:
    """The clean record of a kind; `default` is the dimension where the row states none.

    The id is a digest of the normalised prompt, the texts and the dimension: equal ids are duplicates.
    Raises LeftOut when something is missing or empty, or a pair is one text twice.
    """
    prompt = clean_prompt(example.prompt)
    if kind == "prompts":
        return as_prompt(prompt, source, example.category)
    response = _clean_response(example.response)
    if kind == "demonstrations":
        return as_demonstration(prompt, response, source)
    rejected = _clean_response(example.rejected)
    if response == rejected:
        raise LeftOut("identical")
    dimension = example.dimension or default
    return Preference(
        content_id("preference", normalized(prompt), response, rejected, dimension),
        prompt,
        response,
        rejected,
        dimension,
        example.response_safe,
        example.rejected_safe,
        source,
    )


def as_demonstration(prompt: Conversation, response: str, source: str) -> Demonstration:
    """A demonstration of clean texts, with its id."""
    return Demonstration(content_id("demonstration", normalized(prompt), response), prompt, response, source)


def as_prompt(prompt: Conversation, source: str, category: str | None = None) -> Prompt:
    """A prompt record of clean text, with its id."""
    return Prompt(content_id("prompt", normalized(prompt)), prompt, source, category)


def _clean_response(text: str | None) -> str:
    if text is None:
        raise LeftOut("unanswered")
    cleaned = clean_text(text)
    if not cleaned:
        raise LeftOut("empty")
    return cleaned
