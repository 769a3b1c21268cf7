"""Rows that preprocess leaves out: each with its reason, counted, and listed in dropped.jsonl."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

REASONS: Mapping[str, str] = {
    "empty": "the prompt, one of its turns or a response is empty after cleaning",
    "identical": "chosen and rejected are the same text after cleaning",
    "diverging": "the two dialogues differ before their last answer, so they do not answer the same prompt",
    "unanswered": "the dialogue does not end with an answer of the assistant",
    "duplicate": "an earlier row has the same prompt, texts and dimension",
    "weight": "not sampled: the sources' weights ask for fewer rows of this source",
}
DROPPED = "dropped.jsonl"


class LeftOut(Exception):
    """A well-formed row that cannot be used; `reason` is a key of REASONS."""

    def __init__(self, reason: str) -> None:
        assert reason in REASONS, reason
        super().__init__(REASONS[reason])
        self.reason = reason


class Dropped:
    """The rows left out so far."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, str]] = []

    def add(self, kind: str, source: str, reason: str) -> None:
        """Note one row, named by its source (`file.jsonl:12`)."""
        self._rows.append((kind, source, reason))

    def counts(self) -> dict[str, int]:
        """Rows left out per reason, zeros included."""
        found = Counter(reason for _, _, reason in self._rows)
        return {reason: found[reason] for reason in REASONS}

    def write(self, folder: Path) -> None:
        """Write dropped.jsonl: kind, file, row, reason and what the reason means."""
        with (folder / DROPPED).open("w", encoding="utf-8") as file:
            for kind, source, reason in self._rows:
                name, _, number = source.rpartition(":")
                row = {"kind": kind, "file": name, "row": int(number), "reason": reason}
                file.write(json.dumps(row | {"meaning": REASONS[reason]}, ensure_ascii=False) + "\n")
