"""Rows against each other: prompts in both splits, duplicates, and pairs ranked both ways."""

from collections.abc import Hashable, Sequence

from components.records import normalized
from components.validate.findings import Findings, Place
from components.validate.rows import CheckedRow


def check_leakage(rows: Sequence[CheckedRow], findings: Findings) -> int:
    """How many test rows, of any kind, have a prompt that is also a training prompt of any kind."""
    train: dict[str, Place] = {}
    for row in rows:
        if row.split == "train" and row.prompt:
            train.setdefault(normalized(row.prompt), row.place)
    leaked = 0
    for row in rows:
        if row.split == "test" and row.prompt and (twin := train.get(normalized(row.prompt))):
            leaked += 1
            problem = f"is in the training data too, at {twin}"
            findings.error("leakage", row.place, "prompt", problem, row.prompt[-1].content)
    return leaked


def check_duplicates(rows: Sequence[CheckedRow], findings: Findings) -> int:
    """How many rows repeat an earlier one of their kind and split, or rank an earlier pair the other way."""
    first: dict[Hashable, Place] = {}
    duplicates = 0
    for row in rows:
        if not row.prompt:
            continue
        group = (
            row.kind,
            row.split,
            normalized(row.prompt),
            row.label if row.kind == "preferences" else None,
        )
        texts = tuple(row.responses.values())
        if twin := first.get((group, texts)):
            duplicates += 1
            findings.warn("duplicate", row.place, None, f"repeats {twin}")
        elif row.kind == "preferences" and (twin := first.get((group, texts[::-1]))):
            findings.warn("conflict", row.place, "chosen", f"ranks the pair of {twin} the other way")
        first.setdefault((group, texts), row.place)
    return duplicates
