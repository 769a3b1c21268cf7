"""Where rows come from: files on disk or gs://, read row by row as plain values, each row with a name."""

import csv
import gzip
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from components.errors import InputError
from components.storage import fetch, is_remote, local_path

EXTENSIONS = (".json", ".jsonl", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz", ".parquet")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as plain values: a line of JSONL, an element of a JSON array, a data row of CSV or Parquet."""

    value: Any
    where: str
    """Its name in a message: the path and the row, counted from 1."""
    source: str
    """Its name in the data: `file.jsonl:12`."""


def locate(address: str, setting: str, raw: Path | None, scratch: Path) -> list[Path]:
    """The data files at an address: in `raw`, else by its path, or copied from gs:// to `scratch`.

    Raises InputError naming the setting when nothing is there or a folder holds no data file.
    """
    if is_remote(address):
        found = _fetch(address, setting, raw, scratch)
    else:
        local = local_path(address)
        inside = raw / local if raw is not None else local
        found = inside if inside.exists() else _fetch(str(local), setting, raw, scratch)
    if not found.is_dir():
        return [found]
    files = sorted(path for path in found.rglob("*") if path.is_file() and _extension(path) in EXTENSIONS)
    if not files:
        raise InputError(
            f"{setting}: folder {address} holds no data file; accepted: {', '.join(EXTENSIONS)}."
        )
    return files


def labels(files: Sequence[Path]) -> dict[Path, str]:
    """A short name for every file: its own, with its folder's where two files share a name."""
    shared = Counter(path.name for path in set(files))
    return {
        path: path.name if shared[path.name] == 1 else f"{path.parent.name}/{path.name}" for path in files
    }


def read_rows(path: Path, label: str) -> Iterator[Row]:
    """Every row of a data file. Raises InputError naming the file and the row that cannot be read."""
    extension = _extension(path)
    if extension not in EXTENSIONS:
        raise InputError(f"{path}: the format of this file is not known; accepted: {', '.join(EXTENSIONS)}.")
    reader = _READERS[extension.removesuffix(".gz")]
    try:
        for number, value in reader(path):
            yield Row(value, f"{path} row {number}", f"{label}:{number}")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({error}); copy or compress it again.") from None


def _fetch(address: str, setting: str, raw: Path | None, scratch: Path) -> Path:
    try:
        # A folder per address: two addresses may end in the same name.
        return fetch(address, scratch / address.removeprefix("gs://").replace("/", "_"))
    except InputError as error:
        looked = f" It is not in the raw input ({raw}) either." if raw and not is_remote(address) else ""
        raise InputError(f"{setting}: {error}{looked} Correct the path in {setting}.") from None


def _extension(path: Path) -> str:
    """The suffix of a data file, with .gz where it is zipped."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def _open(path: Path) -> TextIO:
    """The file as text, unzipped; utf-8-sig because spreadsheets put a byte order mark first."""
    if path.suffix.lower() == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig", newline=""))
    return path.open(encoding="utf-8-sig", newline="")


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path} row {number}: not JSON: {error.msg} at column {error.colno}; accepted: one JSON "
                    "value per line. Correct or remove the line."
                ) from None


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    with _open(path) as file:
        text = file.read()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = " A file with one JSON value per line ends in .jsonl." if error.msg == "Extra data" else ""
        raise InputError(f"{path}: not JSON: {error}.{hint}") from None
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        seen = f"the keys {', '.join(value)}" if isinstance(value, dict) else type(value).__name__
        raise InputError(f'{path}: holds {seen}; accepted: an array of rows, or {{"data": [...]}}.')
    yield from enumerate(rows, start=1)


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(sys.maxsize)  # a dialogue is longer than the default of 128 KiB
    with _open(path) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for number, row in enumerate(reader, start=1):
                if None in row:
                    raise InputError(
                        f"{path} row {number}: has more cells than the header's "
                        f"{len(reader.fieldnames or ())}; quote cells that hold a comma."
                    )
                row.pop("", None)  # a column without a name: the index that pandas writes
                yield number, row
        except csv.Error as error:
            raise InputError(f"{path} line {reader.line_num}: not CSV: {error}.") from None


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(path).iter_batches()
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not a Parquet file: {error}") from None


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
