"""Text to train a base model from: a user's file, or the training rows of a DataDir."""

import json
from pathlib import Path

from components.artifacts import DataDir
from components.errors import InputError
from components.records import Conversation, Message, parse_prompt, text_field

Document = str | Conversation


def file_documents(path: Path) -> list[Document]:
    """The documents of a text file, by its ending.

    .jsonl: one per row, a string, {"text": ...} or {"prompt": ..., "response": ...}; anything else is plain text
    with blank lines between documents. Raises InputError naming the file and row that does not fit, or the file
    when it holds fewer than two.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        documents = [_row_document(line, f"{path} row {number}") for number, line in lines]
    else:
        documents = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(documents) < 2:
        raise InputError(f"{path}: {len(documents)} documents; a base model needs 2 or more (blank lines part them).")
    return documents


def data_documents(data: DataDir) -> list[Document]:
    """Every training prompt with every response to it, chosen and rejected, good and bad, as conversations."""
    answered = dict.fromkeys((row.prompt, row.response) for row in data.demonstrations("train"))
    for row in data.preferences("train"):
        answered |= dict.fromkeys([(row.prompt, row.chosen), (row.prompt, row.rejected)])
    return [(*prompt, Message("assistant", response)) for prompt, response in answered]


def contents(document: Document) -> list[str]:
    """The texts in a document."""
    return [document] if isinstance(document, str) else [message.content for message in document]


def _row_document(line: str, where: str) -> Document:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error}.") from None
    if isinstance(value, dict) and "prompt" in value:
        return (*parse_prompt(value, where), Message("assistant", text_field(value, "response", where)))
    document = value.get("text") if isinstance(value, dict) else value
    if not isinstance(document, str):
        raise InputError(f'{where}: no text; accepted: a string, {{"text"}} or {{"prompt", "response"}}.')
    return document
