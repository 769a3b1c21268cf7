"""Whole dialogues, as transcripts or message lists, cut into the prompt and the answer to it."""

import re
from dataclasses import dataclass

from components.errors import InputError
from components.preprocess.dropped import LeftOut
from components.records import Conversation, Message

_MARKER = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to the same turns."""

    prompt: Conversation
    chosen: str
    rejected: str


def is_transcript(text: object) -> bool:
    """Whether the text is a dialogue in the notation of HH-RLHF: paragraphs that begin with a speaker."""
    return isinstance(text, str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def parse_transcript(text: str, where: str) -> Conversation:
    """The turns of an HH-RLHF transcript; neighbouring turns of one speaker become one.

    Raises InputError naming `where` when the text does not begin with a turn.
    """
    parts = _MARKER.split(text.strip())
    if len(parts) < 3 or parts[0]:
        raise InputError(
            f"{where} does not begin with a turn: {text.strip()[:40]!r}; accepted: a transcript "
            r'"\n\nHuman: ...\n\nAssistant: ...". Bare answers need a field \'prompt\' beside them.'
        )
    turns: list[Message] = []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        role, content = _ROLES[speaker], content.strip()
        if turns and turns[-1].role == role:
            # Chat templates insist on alternating speakers.
            content = f"{turns.pop().content}\n\n{content}".strip()
        turns.append(Message(role, content))
    return tuple(turns)


def cut_pair(chosen: Conversation, rejected: Conversation) -> Pair:
    """The turns two dialogues share, and the last answer of each.

    Raises LeftOut when a dialogue does not end with an answer, or when they differ before it.
    """
    if not all(dialogue and dialogue[-1].role == "assistant" for dialogue in (chosen, rejected)):
        raise LeftOut("unanswered")
    if _stripped(chosen[:-1]) != _stripped(rejected[:-1]):
        raise LeftOut("diverging")
    return Pair(chosen[:-1], chosen[-1].content, rejected[-1].content)


def _stripped(dialogue: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content.strip()) for message in dialogue]
