"""The forms a row may have, told apart by its keys, and what each says: a prompt and its responses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from components.errors import InputError
from components.preprocess.dialogues import Pair, cut_pair, is_transcript, parse_transcript
from components.preprocess.settings import Format
from components.preprocess.sources import Row
from components.records import DIMENSIONS, Conversation, Dimension, flag_field, parse_prompt, text_field

FORMS: dict[Format, str] = {
    "response": "{prompt, response}",
    "pair": "{prompt, chosen, rejected}, also with dimension, chosen_safe, rejected_safe",
    "prompt": "a string, or {prompt}, also with category",
    "messages": "{messages: [{role, content}, ...]}",
    "hh": r'{chosen, rejected} with whole dialogues "\n\nHuman: ...\n\nAssistant: ..."',
    "safe-rlhf": "{prompt, response_0, response_1, better_response_id, safer_response_id, ...}",
}
ACCEPTED: dict[str, tuple[Format, ...]] = {
    "demonstrations": ("response", "messages", "pair", "hh", "safe-rlhf"),
    "preferences": ("pair", "hh", "safe-rlhf"),
    "prompts": ("prompt", "response", "messages", "pair", "hh", "safe-rlhf"),
}
"""Which forms hold what a kind of record needs; of a pair, a demonstration is the chosen response."""


@dataclass(frozen=True, slots=True)
class Example:
    """What one row says, whatever its form: a prompt and, where the form has them, responses and labels."""

    prompt: Conversation
    response: str | None = None
    """The response to imitate; of a pair, the chosen one."""
    rejected: str | None = None
    dimension: Dimension | None = None
    response_safe: bool | None = None
    rejected_safe: bool | None = None
    category: str | None = None


def detect(row: Row, kind: str) -> Format:
    """The form of a row, by its keys.

    Raises InputError with the keys seen when it is no form that `kind` accepts.
    """
    form = _form(row.value)
    if form in ACCEPTED[kind]:
        return form
    forms = "; ".join(f"{name} = {FORMS[name]}" for name in ACCEPTED[kind])
    raise InputError(
        f"{row.where}: has {_seen(row.value)}, which is no form that {kind} can come in. Accepted: {forms}."
    )


def require_accepted(form: Format, kind: str, setting: str) -> None:
    """Check a form that the settings name. Raises InputError when it does not hold what `kind` needs."""
    if form != "auto" and form not in ACCEPTED[kind]:
        raise InputError(f"{setting} is {form}; accepted for {kind}: auto, {', '.join(ACCEPTED[kind])}.")


def parse(row: Row, form: Format) -> Sequence[Example]:
    """What a row of the given form says; a safe-rlhf row says up to two things.

    Raises InputError naming row and field when it is malformed, LeftOut when it is well-formed but of no use.
    """
    if form == "prompt" and isinstance(row.value, str):
        return [Example(_prompt({"prompt": row.value}, row.where))]
    if not isinstance(row.value, Mapping):
        raise InputError(f"{row.where}: has {_seen(row.value)}; accepted in this file: {FORMS[form]}.")
    return _PARSERS[form](row.value, row.where)


def _form(value: Any) -> Format | None:
    if isinstance(value, str):
        return "prompt"
    keys = set(value) if isinstance(value, Mapping) else set()
    if {"response_0", "response_1"} <= keys:
        return "safe-rlhf"
    if {"chosen", "rejected"} <= keys:
        bare = "prompt" not in keys and isinstance(value["chosen"], str)
        return "hh" if bare or is_transcript(value["chosen"]) else "pair"
    for key, form in (("messages", "messages"), ("response", "response"), ("prompt", "prompt")):
        if key in keys and (key != "response" or "prompt" in keys):
            return cast(Format, form)
    return None


def _seen(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"the keys {', '.join(map(str, value)) or '(none)'}"
    return f"a value of type {type(value).__name__}"


def _prompt(row: Mapping[str, Any], where: str) -> Conversation:
    """The prompt of a row; a transcript that stops where the assistant is to answer becomes turns."""
    text = row.get("prompt")
    if isinstance(text, str) and is_transcript(text) and text.rstrip().endswith("\n\nAssistant:"):
        return parse_transcript(text, f"{where}: field 'prompt'")[:-1]
    return parse_prompt(row, where)


def _response(row: Mapping[str, Any], where: str) -> list[Example]:
    return [Example(_prompt(row, where), text_field(row, "response", where), category=_category(row, where))]


def _bare_prompt(row: Mapping[str, Any], where: str) -> list[Example]:
    return [Example(_prompt(row, where), category=_category(row, where))]


def _messages(row: Mapping[str, Any], where: str) -> list[Example]:
    """A final turn of the assistant is the response; without one, a prompt up to the user's last turn."""
    turns = parse_prompt(row, where, "messages")
    if not turns or all(turn.role != "user" for turn in turns):
        raise InputError(f"{where}: field 'messages' has no turn of the user; accepted: {FORMS['messages']}.")
    if turns[-1].role == "assistant":
        return [Example(turns[:-1], turns[-1].content)]
    last_user = max(index for index, turn in enumerate(turns) if turn.role == "user")
    return [Example(turns[: last_user + 1])]


def _pair(row: Mapping[str, Any], where: str) -> list[Example]:
    """A pair of texts, or of message lists: answers alone beside a prompt, or whole dialogues."""
    if isinstance(row.get("chosen"), list) or isinstance(row.get("rejected"), list):
        pair = cut_pair(parse_prompt(row, where, "chosen"), parse_prompt(row, where, "rejected"))
        if not pair.prompt:
            pair = Pair(_prompt(row, where), pair.chosen, pair.rejected)
    else:
        pair = Pair(_prompt(row, where), text_field(row, "chosen", where), text_field(row, "rejected", where))
    return [_example(pair, row, where)]


def _hh(row: Mapping[str, Any], where: str) -> list[Example]:
    chosen, rejected = (
        parse_transcript(text_field(row, field, where), f"{where}: field '{field}'")
        for field in ("chosen", "rejected")
    )
    return [_example(cut_pair(chosen, rejected), row, where)]


def _example(pair: Pair, row: Mapping[str, Any], where: str) -> Example:
    return Example(
        pair.prompt,
        pair.chosen,
        pair.rejected,
        _dimension(row, where),
        _flag(row, "chosen_safe", where),
        _flag(row, "rejected_safe", where),
        _category(row, where),
    )


def _safe_rlhf(row: Mapping[str, Any], where: str) -> list[Example]:
    """One example per label: the better response is the helpful one, the safer response the harmless one."""
    prompt = _prompt(row, where)
    texts = [text_field(row, f"response_{index}", where) for index in (0, 1)]
    safe = [_flag(row, f"is_response_{index}_safe", where) for index in (0, 1)]
    better, safer = _index(row, "better_response_id", where), _index(row, "safer_response_id", where)
    if better is None and safer is None:
        raise InputError(f"{where}: fields 'better_response_id' and 'safer_response_id' are both missing.")
    return [
        Example(prompt, texts[first], texts[1 - first], dimension, safe[first], safe[1 - first])
        for dimension, first in zip(DIMENSIONS, (better, safer), strict=True)
        if first is not None
    ]


def _index(row: Mapping[str, Any], field: str, where: str) -> int | None:
    value = row.get(field)
    if value is None or value == "":
        return None
    if value in (0, 1, "0", "1"):
        return int(value)
    raise InputError(f"{where}: field '{field}' is {value!r}; accepted: 0 or 1.")


def _flag(row: Mapping[str, Any], field: str, where: str) -> bool | None:
    """A flag, also as CSV writes it: true, False, or an empty cell."""
    value = row.get(field)
    if isinstance(value, str) and value.strip().lower() in _CSV_FLAGS:
        return _CSV_FLAGS[value.strip().lower()]
    return flag_field(row, field, where)


def _dimension(row: Mapping[str, Any], where: str) -> Dimension | None:
    value = row.get("dimension")
    if value is None or value == "":
        return None
    if value in DIMENSIONS:
        return cast(Dimension, value)
    raise InputError(f"{where}: field 'dimension' is {value!r}; accepted: helpful, harmless, or absent.")


def _category(row: Mapping[str, Any], where: str) -> str | None:
    return None if row.get("category") in (None, "") else text_field(row, "category", where)


_CSV_FLAGS: Mapping[str, bool | None] = {"true": True, "false": False, "": None}
_PARSERS: dict[Format, Callable[[Mapping[str, Any], str], list[Example]]] = {
    "response": _response,
    "pair": _pair,
    "prompt": _bare_prompt,
    "messages": _messages,
    "hh": _hh,
    "safe-rlhf": _safe_rlhf,
}
