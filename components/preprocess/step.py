"""The preprocess step: sources in any accepted form become one clean, split data folder."""

import logging
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from components.artifacts import DataDir, Metrics
from components.errors import InputError
from components.preprocess.cleaning import as_demonstration, as_prompt, to_record
from components.preprocess.dropped import DROPPED, Dropped, LeftOut
from components.preprocess.formats import detect, parse, require_accepted
from components.preprocess.mixing import Pool, distinct, mix
from components.preprocess.settings import Format, PreprocessSettings, Source
from components.preprocess.sources import Row, labels, locate, read_rows
from components.preprocess.splits import fixed_splits, split_of
from components.records import KINDS, SPLITS, Dimension, Preference, Record

logger = logging.getLogger(__name__)


def run(settings: PreprocessSettings, *, raw: Path | None, data: Path) -> Metrics:
    """Counts of the rows kept, per kind and split, and of those left out, per reason.

    Writes `data` (a DataDir), with the rows left out in dropped.jsonl. Raises InputError when there is no
    source, a source is missing, or a row is malformed.
    """
    if not settings.preferences and not settings.demonstrations:
        raise InputError(
            "preprocess.preferences and preprocess.demonstrations are both empty; give at least one a file: "
            "preprocess.preferences=FILE."
        )
    dropped = Dropped()
    with tempfile.TemporaryDirectory(prefix="plumbline-") as scratch:
        pools = _read(settings, raw, Path(scratch), dropped)
    pins = fixed_splits(pool for kind in KINDS for pool in pools[kind])
    tables = {kind: mix(distinct(pools[kind], kind, dropped), kind, settings.seed, dropped) for kind in KINDS}
    _derive(tables, settings)
    records: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for kind, rows in tables.items():
        for record in rows:
            records[kind, split_of(record, pins, settings.seed, settings.test_share)].append(record)
    data.mkdir(parents=True, exist_ok=True)
    dropped.write(data)  # before the manifest, which sums up every file
    DataDir.write(data, records, settings.model_dump(mode="json"), {"raw": raw} if raw is not None else {})
    metrics = _metrics(records, dropped)
    logger.info("preprocess: %s; rows left out are in %s", metrics, data / DROPPED)
    return metrics


def _read(
    settings: PreprocessSettings, raw: Path | None, scratch: Path, dropped: Dropped
) -> dict[str, list[Pool]]:
    """The clean records of every source, per kind."""
    located: list[tuple[str, str, Source, list[Path]]] = []
    for kind in KINDS:
        for index, source in enumerate(getattr(settings, kind)):
            setting = f"preprocess.{kind}[{index}]"
            require_accepted(source.format, kind, f"{setting}.format")
            located.append((kind, setting, source, locate(source.path, f"{setting}.path", raw, scratch)))
    names = labels([path for *_, files in located for path in files])
    pools: dict[str, list[Pool]] = {kind: [] for kind in KINDS}
    for kind, setting, source, files in located:
        default = source.dimension or settings.dimension
        records = [
            record
            for path in files
            for record in _records(read_rows(path, names[path]), kind, source.format, default, dropped)
        ]
        logger.info("preprocess: %d %s from %s", len(records), kind, source.path)
        pools[kind].append(Pool(setting, source, records))
    return pools


def _records(
    rows: Iterable[Row], kind: str, form: Format, default: Dimension, dropped: Dropped
) -> Iterator[Record]:
    """The clean records of one file's rows; its first row decides the form unless the settings name it."""
    for row in rows:
        if form == "auto":
            form = detect(row, kind)
        try:
            found = [to_record(example, kind, default, row.source) for example in parse(row, form)]
        except LeftOut as left:
            dropped.add(kind, row.source, left.reason)
        else:
            # Both labels of a safe-rlhf row may name one response: one record, not a duplicate.
            yield from {record.id: record for record in found}.values()


def _derive(tables: dict[str, list[Record]], settings: PreprocessSettings) -> None:
    """Fill the kinds without a source: demonstrations with chosen responses, prompts with those of pairs."""
    preferences = [record for record in tables["preferences"] if isinstance(record, Preference)]
    if not settings.demonstrations:
        tables["demonstrations"] = _unique(
            as_demonstration(row.prompt, row.chosen, row.source) for row in preferences
        )
    if not settings.prompts:
        tables["prompts"] = _unique(
            as_prompt(row.prompt, row.source) for row in preferences or tables["demonstrations"]
        )


def _unique(records: Iterable[Record]) -> list[Record]:
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(record.id, record)
    return list(first.values())


def _metrics(records: Mapping[tuple[str, str], Sequence[Record]], dropped: Dropped) -> Metrics:
    reasons = dropped.counts()
    counts = {
        f"preprocess/num_{kind}_{split}": float(len(records.get((kind, split), ())))
        for kind in KINDS
        for split in SPLITS
    }
    return {
        "preprocess/num_rows": sum(counts.values()),
        "preprocess/num_dropped": float(sum(reasons.values())),
        **counts,
        **{f"preprocess/dropped_{reason}": float(count) for reason, count in reasons.items()},
    }
