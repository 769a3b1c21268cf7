"""How much there is of what: rows per kind and split, and the shares of dimensions and categories."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from components.records import KINDS, SPLITS
from components.validate.findings import Findings, Level, Place
from components.validate.rows import CheckedRow
from components.validate.settings import ValidateSettings


@dataclass(frozen=True, slots=True)
class Amount:
    """Rows of one kind, split and label (dimension or category; None where rows have none)."""

    kind: str
    split: str
    label: str | None
    count: int
    share: float
    """Of the kind's rows in the split."""


def amounts(rows: Sequence[CheckedRow]) -> list[Amount]:
    """How many rows every kind and split has of each label, the most frequent first."""
    result = []
    for kind in KINDS:
        for split in SPLITS:
            labels = Counter(row.label for row in rows if (row.kind, row.split) == (kind, split))
            result += [
                Amount(kind, split, label, count, count / labels.total())
                for label, count in labels.most_common()
            ]
    return result


def check_amounts(rows: Sequence[CheckedRow], settings: ValidateSettings, findings: Findings) -> None:
    """Report kinds, splits and dimensions with fewer rows than the next steps need."""
    sizes = Counter((row.kind, row.split) for row in rows)
    for kind in KINDS:
        for split in SPLITS:
            minimum = settings.min_train if split == "train" else settings.min_test
            if sizes[kind, split] < minimum:
                level: Level = "warn" if (kind, split) == ("demonstrations", "test") else "error"
                problem = (
                    f"fewer rows than validate.min_{split}, which is {minimum}; add {kind}"
                    f"{' or raise preprocess.test_share' if split == 'test' else ''}"
                )
                findings.add(
                    level, "too few", Place(f"{kind}/{split}.parquet"), None, problem, sizes[kind, split]
                )
    labelled = Counter((row.split, row.label) for row in rows if row.kind == "preferences")
    for dimension in settings.dimensions:
        for split in SPLITS:
            if sizes["preferences", split] and not labelled[split, dimension]:
                problem = (
                    f"no {dimension} preferences, which validate.dimensions asks for; add some, set "
                    "preprocess.dimension to what the labels judge, or shorten validate.dimensions"
                )
                findings.error("too few", Place(f"preferences/{split}.parquet"), "dimension", problem, 0)
