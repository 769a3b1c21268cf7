"""Row by row: is every field there, of its type, not empty, and in agreement with the others?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from components.artifacts import DataDir
from components.errors import InputError
from components.records import DIMENSIONS, Conversation, parse_prompt
from components.validate.findings import Findings, Place

RESPONSES: Mapping[str, tuple[str, ...]] = {
    "demonstrations": ("response",),
    "preferences": ("chosen", "rejected"),
    "prompts": (),
}
"""The fields of each kind that hold a response."""


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """What could be read of one row: a field that is broken is absent here and among the findings."""

    kind: str
    split: str
    place: Place
    prompt: Conversation | None
    responses: dict[str, str] = field(default_factory=dict)
    label: str | None = None
    """The dimension of a preference, the category of a prompt."""


def check_rows(data: DataDir, kind: str, split: str, findings: Findings) -> list[CheckedRow]:
    """The rows of one table, none when it cannot be read; what is wrong goes to the findings."""
    import pyarrow as pa

    file = f"{kind}/{split}.parquet"
    try:
        return [_check(kind, split, place, row, findings) for place, row in _rows(data, kind, split, file)]
    except InputError as error:
        findings.error("file", Place(file), None, str(error))
    except (pa.ArrowException, OSError) as error:
        findings.error("file", Place(file), None, f"not a Parquet file that can be read: {error}")
    return []


def _rows(data: DataDir, kind: str, split: str, file: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    for number, (_, row) in enumerate(data.rows(kind, split), start=1):
        source = row.get("source")
        yield Place(file, number, source if isinstance(source, str) else None), row


def _check(kind: str, split: str, place: Place, row: Mapping[str, Any], findings: Findings) -> CheckedRow:
    for name in ("id", "source"):
        _text(row, name, place, findings)
    prompt = _prompt(row, place, findings)
    responses = {name: _text(row, name, place, findings) for name in RESPONSES[kind]}
    label = None
    if kind == "preferences":
        label = _dimension(row, place, findings)
        _check_pair(row, label, place, findings)
    if kind == "prompts" and row.get("category") is not None:
        label = _text(row, "category", place, findings)
    present = {name: text for name, text in responses.items() if text is not None}
    return CheckedRow(kind, split, place, prompt, present, label)


def _text(row: Mapping[str, Any], name: str, place: Place, findings: Findings) -> str | None:
    """The text in a field, unless it is missing, of another type, or empty."""
    value = row.get(name)
    if value is None:
        findings.error("missing", place, name, "is missing; accepted: a string")
    elif not isinstance(value, str):
        findings.error("type", place, name, f"is of type {type(value).__name__}; accepted: a string", value)
    elif not value.strip():
        findings.error("empty", place, name, "is empty")
    else:
        return value
    return None


def _prompt(row: Mapping[str, Any], place: Place, findings: Findings) -> Conversation | None:
    value = row.get("prompt")
    if value is None:
        findings.error("missing", place, "prompt", "is missing; accepted: a string or a list of messages")
        return None
    if not isinstance(value, str | list):
        findings.error(
            "type", place, "prompt", f"is of type {type(value).__name__}; accepted: messages", value
        )
        return None
    try:
        prompt = parse_prompt(row, str(place))
    except InputError as error:
        findings.error("type", place, "prompt", str(error).removeprefix(f"{place}: "))
        return None
    _check_turns(prompt, place, findings)
    return prompt or None


def _check_turns(prompt: Conversation, place: Place, findings: Findings) -> None:
    if not prompt:
        findings.error("empty", place, "prompt", "has no turns")
        return
    for number, turn in enumerate(prompt, start=1):
        if not turn.content.strip():
            findings.error("empty", place, "prompt", f"turn {number} ({turn.role}) is empty")
    if prompt[-1].role != "user":
        problem = "the last turn is not the user's, so there is nothing to respond to"
        findings.error("last turn", place, "prompt", problem, prompt[-1].role)
    roles = [turn.role for turn in prompt if turn.role != "system"]
    if any(first == second for first, second in pairwise(roles)):
        problem = "two turns of one speaker in a row, which many chat templates refuse"
        findings.warn("alternation", place, "prompt", problem, ", ".join(roles))


def _dimension(row: Mapping[str, Any], place: Place, findings: Findings) -> str | None:
    value = row.get("dimension")
    if value in DIMENSIONS:
        return str(value)
    check = "missing" if value is None else "type"
    findings.error(check, place, "dimension", f"accepted: {', '.join(DIMENSIONS)}", value)
    return None


def _check_pair(row: Mapping[str, Any], dimension: str | None, place: Place, findings: Findings) -> None:
    """Flags of the right type, two different texts, and a harmless label that agrees with the flags."""
    for name in ("chosen_safe", "rejected_safe"):
        if not isinstance(row.get(name), bool | None):
            findings.error("type", place, name, "accepted: true, false, or absent", row[name])
    if isinstance(row.get("chosen"), str) and row["chosen"] == row.get("rejected"):
        problem = "is the same text as 'chosen': the pair prefers nothing"
        findings.error("identical pair", place, "rejected", problem, row["rejected"])
    if dimension == "harmless" and row.get("chosen_safe") is False and row.get("rejected_safe") is True:
        problem = "contradicts the label: the chosen response is flagged unsafe and the rejected one safe"
        findings.error("contradiction", place, "chosen_safe", problem, False)
