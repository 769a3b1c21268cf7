"""What the options of the benchmarks' command lines accept."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path


def some(accepted: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Names with commas between them, each one that is accepted."""

    def split(text: str) -> tuple[str, ...]:
        for name in (names := tuple(text.split(","))):
            if name not in accepted:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(accepted)}")
        return names

    return split


def positive(text: str) -> int:
    """A number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def file(text: str) -> Path:
    """The path of a file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return Path(text)
