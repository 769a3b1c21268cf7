"""Which prompt is for training and which for testing: decided once per prompt, for every kind of record."""

import hashlib
from collections.abc import Iterable, Mapping

from components.preprocess.mixing import Pool
from components.records import Record, normalized


def fixed_splits(pools: Iterable[Pool]) -> dict[str, str]:
    """The split of every prompt (normalised) that a source pins; a prompt pinned to both is a test prompt."""
    pins: dict[str, str] = {}
    for pool in pools:
        if pool.source.split is None:
            continue
        for record in pool.records:
            prompt = normalized(record.prompt)
            pins[prompt] = "test" if "test" in (pins.get(prompt), pool.source.split) else "train"
    return pins


def split_of(record: Record, pins: Mapping[str, str], seed: int, test_share: float) -> str:
    """`train` or `test`: as pinned, else by a hash of seed and normalised prompt.

    The hash knows nothing of the other rows, so adding data moves no prompt from one split to the other.
    """
    prompt = normalized(record.prompt)
    if prompt in pins:
        return pins[prompt]
    digest = hashlib.sha256(f"{seed}\x1e{prompt}".encode()).digest()
    return "test" if int.from_bytes(digest[:8]) / 2**64 < test_share else "train"
