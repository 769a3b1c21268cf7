"""What validate finds: errors and warnings, each with file, row, field and value."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Level = Literal["error", "warn"]
IN_MESSAGE = 5
"""Errors named in the exception's message; the report has the rest."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where something is: a file, and a row (counted from 1) with the name it had in its source."""

    file: str
    row: int | None = None
    source: str | None = None

    def __str__(self) -> str:
        row = "" if self.row is None else f" row {self.row}"
        return f"{self.file}{row}{f' ({self.source})' if self.source else ''}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong or suspicious."""

    level: Level
    check: str
    """Name of the check, under which findings are counted."""
    place: Place
    field: str | None
    problem: str
    value: str | None = None

    def as_row(self) -> dict[str, Any]:
        """The finding as plain values, for report.json."""
        return {
            "level": self.level,
            "check": self.check,
            "file": self.place.file,
            "row": self.place.row,
            "source": self.place.source,
            "field": self.field,
            "problem": self.problem,
            "value": self.value,
        }

    def __str__(self) -> str:
        field = f", field '{self.field}'" if self.field else ""
        value = f" (seen: {self.value})" if self.value is not None else ""
        return f"{self.place}{field}: {self.problem}{value}"


class Findings:
    """The findings so far: all counted, the first `limit` of every check kept."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: list[Finding] = []
        self.counts: Counter[tuple[Level, str]] = Counter()
        """Findings per level and check."""

    def error(self, check: str, place: Place, field: str | None, problem: str, value: object = None) -> None:
        """Note what must be corrected."""
        self.add("error", check, place, field, problem, value)

    def warn(self, check: str, place: Place, field: str | None, problem: str, value: object = None) -> None:
        """Note what may be meant, but should be looked at."""
        self.add("warn", check, place, field, problem, value)

    def add(
        self, level: Level, check: str, place: Place, field: str | None, problem: str, value: object = None
    ) -> None:
        """Note a finding of a level that a setting decides."""
        self.counts[level, check] += 1
        if self.counts[level, check] <= self._limit:
            shown = None if value is None else excerpt(value)
            self._kept.append(Finding(level, check, place, field, problem, shown))

    def number(self, level: Level) -> int:
        """How many findings of a level there are, listed or not."""
        return sum(count for (of_level, _), count in self.counts.items() if of_level == level)

    def listed(self) -> Sequence[Finding]:
        """The kept findings, errors first."""
        return sorted(self._kept, key=lambda finding: finding.level != "error")

    def message(self, page: Path) -> str:
        """The first errors in sentences, how many more there are, and the report's path."""
        errors = [finding for finding in self.listed() if finding.level == "error"]
        total = self.number("error")
        lines = [f"validate found {total} {'error' if total == 1 else 'errors'}:"]
        lines += [f"  {finding}" for finding in errors[:IN_MESSAGE]]
        if total > IN_MESSAGE:
            lines.append(f"  ... and {total - IN_MESSAGE} more")
        lines.append(f"Correct them where they come from and run again. Every finding: {page}")
        return "\n".join(lines)


def excerpt(value: object) -> str:
    """The value on one short line."""
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."
