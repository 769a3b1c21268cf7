"""The demo step: writes the raw files that a person's own data would come as."""

import json
import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from components.demo.demonstrations import corpus, demonstrations
from components.demo.preferences import preferences
from components.demo.prompts import held_out_prompts, training_prompts
from components.demo.questions import normalized
from components.demo.settings import DemoSettings
from components.errors import InputError

log = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, str | bool]]


def run(settings: DemoSettings, *, raw: Path) -> dict[str, float]:
    """Counts of what was written to the folder `raw`: corpus, demonstrations, preferences, prompts and test prompts.

    The same settings give the same bytes. Raises InputError when `raw` is a file, or when more test prompts
    are asked for than the world holds out.
    """
    if raw.exists() and not raw.is_dir():
        raise InputError(f"raw is {raw}, which is a file; give a folder to write the demo data to.")
    files = _files(settings)
    _assert_held_out(files)
    raw.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (raw / name).write_text(_serialized(name, rows), encoding="utf-8")
    counts = {f"demo/{name.split('.')[0]}": float(len(rows)) for name, rows in files.items()}
    log.info("demo data with seed %d in %s: %s", settings.seed, raw, counts)
    return counts


def _files(settings: DemoSettings) -> dict[str, Rows]:
    """The rows of each file. Each file has its own generator, so its size does not change the others."""

    def rng(name: str) -> random.Random:
        return random.Random(f"{settings.seed} {name}")

    return {
        "corpus.jsonl": corpus(settings.num_corpus, rng("corpus")),
        "demonstrations.json": demonstrations(settings.num_demonstrations, rng("demonstrations")),
        "preferences.jsonl": preferences(settings.num_pairs, settings.label_noise, rng("preferences")),
        "prompts.jsonl": training_prompts(settings.num_prompts, rng("prompts")),
        "test_prompts.jsonl": held_out_prompts(settings.num_test_prompts, rng("test_prompts")),
    }


def _assert_held_out(files: Mapping[str, Rows]) -> None:
    prompts = {name: {normalized(str(row["prompt"])) for row in rows} for name, rows in files.items()}
    held_out = prompts.pop("test_prompts.jsonl")
    for name, seen in prompts.items():
        assert not held_out & seen, f"{name} has prompts of test_prompts.jsonl"


def _serialized(name: str, rows: Rows) -> str:
    """A JSON array of one row per line, or one JSON object per line: both forms that raw data comes in."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if name.endswith(".json"):
        return "[\n" + ",\n".join(lines) + "\n]\n"
    return "\n".join(lines) + "\n"
