"""The prompts of a user's file: a row is a string, {"prompt": ...} or {"messages": [...]}."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from components.errors import InputError
from components.records import Prompt, content_id, parse_prompt

SUFFIXES = (".jsonl", ".json", ".txt")
FORMS = 'a string, {"prompt": ...} or {"messages": [{"role": ..., "content": ...}]}'


def read_prompts(path: Path) -> list[Prompt]:
    """Every prompt of the file. Raises InputError naming file and row for one that is malformed."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: prompts are read from {', '.join(SUFFIXES)} files.")
    prompts = [_prompt(row, where) for where, row in _rows(path)]
    if not prompts:
        raise InputError(f"{path}: no prompts in it.")
    return prompts


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Every row as a plain value, and where it stands; empty lines are left out."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8.") from None
    if path.suffix == ".json":
        yield from _elements(path, text)
        return
    # not splitlines(): JSON may hold U+2028 and the like inside a string
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield (
                f"{path}:{number}",
                line.strip() if path.suffix == ".txt" else _json(line, f"{path}:{number}"),
            )


def _elements(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The elements of a file with one JSON array."""
    rows = _json(text, str(path))
    if not isinstance(rows, list):
        raise InputError(f"{path}: holds {type(rows).__name__}; accepted: an array of rows, each {FORMS}.")
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", row


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error}.") from None


def _prompt(row: Any, where: str) -> Prompt:
    """The prompt of a row. Raises InputError unless it is a conversation in which the user spoke last."""
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, Mapping) or not ("prompt" in row or "messages" in row):
        seen = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        raise InputError(f"{where}: the row holds {seen or 'nothing'}; accepted: {FORMS}.")
    field = "prompt" if "prompt" in row else "messages"
    prompt = parse_prompt(row, where, field)
    if not prompt or prompt[-1].role != "user" or not prompt[-1].content.strip():
        seen = "empty" if not prompt or not prompt[-1].content.strip() else f"the {prompt[-1].role}'s last"
        raise InputError(
            f"{where}: field '{field}' is {seen}; accepted: text, or messages that end with the user's."
        )
    return Prompt(content_id(prompt), prompt, where)
