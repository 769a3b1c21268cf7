"""What passes between steps on disk: folders with a manifest of their content.

`manifest.json` holds kind, schema version, counts, a sha256 for every file, one digest over all of them, the
settings and the code version that made it, and the digests of the folders it was made from.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from components.errors import InputError
from components.records import KINDS, RECORD_TYPES, SPLITS, Demonstration, Preference, Prompt, Record, to_row

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CARD = "card.json"
MEMBERS = "members"
ADAPTER = "adapter"
Metrics = dict[str, float]
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the architectures with a language-model head end in config.json; a reward model's, say, ends otherwise."""


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: object) -> str:
    """A sha256 over the value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all: to a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises InputError when it is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON: {error}.") from None


def content_digest(folder: Path) -> tuple[dict[str, str], str]:
    """The sha256 of every file under `folder` but its manifest, and one digest over names and sums."""
    files = {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    return files, json_digest(files)


def write_manifest(
    folder: Path,
    kind: str,
    *,
    counts: Mapping[str, int] | None = None,
    settings: Mapping[str, Any] | None = None,
    parents: Mapping[str, Path] | None = None,
) -> str:
    """Describe a finished folder in its manifest, written last; returns the folder's digest."""
    files, digest = content_digest(folder)
    manifest = {
        "kind": kind,
        "schema_version": SCHEMA_VERSION,
        "counts": dict(counts or {}),
        "files": files,
        "digest": digest,
        "settings": dict(settings or {}),
        "code_version": version("plumbline"),
        "parents": {name: folder_digest(path) for name, path in (parents or {}).items()},
    }
    write_json(folder / MANIFEST, manifest)
    return digest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder. Raises InputError when there is none or it is of another schema."""
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"{folder / MANIFEST}: schema_version is {manifest.get('schema_version')!r}; this version of plumbline "
            f"reads {SCHEMA_VERSION}. Run the step that wrote it again."
        )
    return manifest


def folder_digest(folder: Path) -> str:
    """The digest a folder's manifest states, or the digest of its content where it has no manifest or is a file."""
    if folder.is_file():
        return file_sha256(folder)
    if (folder / MANIFEST).exists():
        return str(read_manifest(folder)["digest"])
    return content_digest(folder)[1]


def verify_manifest(folder: Path) -> str:
    """Read every file again and compare; returns the digest. Raises InputError naming what differs."""
    manifest = read_manifest(folder)
    files, digest = content_digest(folder)
    if digest != manifest["digest"]:
        stated = manifest["files"]
        differing = sorted(
            name for name in stated.keys() | files.keys() if stated.get(name) != files.get(name)
        )
        raise InputError(
            f"{folder}: content differs from its manifest in {', '.join(differing) or MANIFEST}; "
            "the folder was altered or copied in part. Publish or copy it again."
        )
    return digest


@dataclass(frozen=True)
class DataDir:
    """Training data as written by preprocess: {demonstrations,preferences,prompts}/{train,test}.parquet."""

    path: Path

    @classmethod
    def write(
        cls,
        path: Path,
        records: Mapping[tuple[str, str], Sequence[Record]],
        settings: Mapping[str, Any],
        parents: Mapping[str, Path],
    ) -> "DataDir":
        """Write every (kind, split) table, empty ones too, and the manifest."""
        import pyarrow.parquet as pq

        counts = {}
        for kind in KINDS:
            (path / kind).mkdir(parents=True, exist_ok=True)
            for split in SPLITS:
                rows = records.get((kind, split), ())
                pq.write_table(_table(kind, map(to_row, rows)), path / kind / f"{split}.parquet")
                counts[f"{kind}/{split}"] = len(rows)
        write_manifest(path, "data", counts=counts, settings=settings, parents=parents)
        return cls(path)

    def rows(self, kind: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every row as plain values, with a name for it (`preferences/train row 7, data.jsonl:9`)."""
        import pyarrow.parquet as pq

        path = self.path / kind / f"{split}.parquet"
        if not path.exists():
            raise InputError(f"{path}: no such file; {self.path} is not a data folder. Run preprocess first.")
        for number, row in enumerate(pq.read_table(path).to_pylist(), start=1):
            yield f"{kind}/{split} row {number} ({row.get('source')})", row

    def load(self, kind: str, split: str) -> list[Record]:
        """All records of one table. Raises InputError naming the row and the field that does not fit."""
        return [RECORD_TYPES[kind].from_row(row, where) for where, row in self.rows(kind, split)]

    def demonstrations(self, split: str) -> list[Demonstration]:
        """The demonstrations of a split."""
        return self.load("demonstrations", split)  # type: ignore[return-value]

    def preferences(self, split: str) -> list[Preference]:
        """The preferences of a split, of both dimensions."""
        return self.load("preferences", split)  # type: ignore[return-value]

    def prompts(self, split: str) -> list[Prompt]:
        """The prompts of a split."""
        return self.load("prompts", split)  # type: ignore[return-value]


@dataclass(frozen=True)
class ModelCard:
    """What plumbline knows of a model folder beyond Hugging Face's own files (card.json)."""

    kind: str
    """policy, reward or cost."""
    base: str
    """Digest of the model that training started from."""
    step: str
    """The step that wrote it."""
    template_digest: str
    """Digest of the chat template: training, evaluation and serving must agree."""
    score_mean: float = 0.0
    """Scalar models: subtracted from a raw score (0 for cost: its zero means something)."""
    score_std: float = 1.0
    """Scalar models: divides a raw score."""

    def write(self, folder: Path) -> None:
        """Write card.json into the model's folder."""
        write_json(folder / CARD, self.__dict__)

    @classmethod
    def read(cls, folder: Path) -> "ModelCard":
        """The card of a model folder. Raises InputError when there is none."""
        return cls(**read_json(folder / CARD))


def member_folders(folder: Path) -> list[Path]:
    """The further models of an ensemble in a model's folder, in order; none where it holds one model alone."""
    return sorted((folder / MEMBERS).glob("[0-9]*"), key=lambda member: int(member.name))


def _table(kind: str, rows: Iterable[dict[str, Any]]) -> Any:
    """An Arrow table with the same columns whether it has rows or not."""
    import pyarrow as pa

    text, flag = pa.string(), pa.bool_()
    conversation = pa.list_(pa.struct([("role", text), ("content", text)]))
    columns = {
        "demonstrations": [("response", text)],
        "preferences": [
            ("chosen", text), ("rejected", text), ("dimension", text), ("chosen_safe", flag), ("rejected_safe", flag),
        ],
        "prompts": [("category", text)],
    }[kind]
    schema = pa.schema([("id", text), ("prompt", conversation), *columns, ("source", text)])
    return pa.Table.from_pylist(list(rows), schema=schema)
