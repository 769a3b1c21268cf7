"""What is measured of a training run, ours or the peer's: the ends of its steps and its memory.

Loads no torch: the parent of the measured processes uses it too, and Linux counts a parent's memory in the peak of
the children that it forks.
"""

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

WORK = {"rloo": "RLOO", "grpo": "GRPO", "online_dpo": "Online DPO", "dpo": "DPO",
        "dpo_later": "DPO after the first epoch", "reward": "reward", "sft": "SFT"}  # fmt: skip
"""What a step can be of, and how the table calls it."""
ROWS = 16
"""Sequences (sft) or pairs (reward, dpo) in a step."""
RESPONSES = 32
"""Responses sampled in a step (rloo, grpo, online_dpo)."""
PROMPT_TOKENS = RESPONSE_TOKENS = 64
"""Of those responses and of their prompts."""
MAX_LENGTH = 256
"""Tokens of a sequence, prompt and response together (sft, reward, dpo)."""
LEARNING_RATE, KL_COEF = 1e-5, 0.05


@dataclass(frozen=True)
class Task:
    """One process's work: which, on which model, how computed, how many steps."""

    what: str
    folder: Path
    """Where `workload.py` put the models and the data."""
    size: str
    dtype: str
    steps: int
    """Measured steps; those before them are left out."""

    @property
    def skipped(self) -> int:
        """Steps before the first measured one: one, or a whole pass over the pairs."""
        return pass_updates(self.steps) if self.what == "dpo_later" else 1

    @property
    def updates(self) -> int:
        """Steps altogether."""
        return self.skipped + self.steps

    @property
    def model(self) -> Path:
        """The folder of policy/ and reward/."""
        return self.folder / self.size

    @classmethod
    def parse(cls, description: str | None) -> "Task":
        """The task that the command line names."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("what", choices=WORK)
        parser.add_argument("folder", type=Path, help="made by workload.py for as many steps")
        parser.add_argument("--size", default="7m")
        parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
        parser.add_argument("--steps", type=int, default=7, help="that are measured")
        return cls(**vars(parser.parse_args()))


@dataclass(frozen=True)
class Measurement:
    """What one process measured of its own training."""

    seconds: list[float]
    """Of every measured step, generation and the making of the batch included."""
    response_tokens: float | None
    """Mean tokens of the sampled responses; None where nothing is sampled, or where the trainer does not tell."""
    peak_mb: float
    """The most memory that was resident until the end of the last step."""
    growth_mb: float
    """How far that is above what was resident with all libraries loaded and no model yet."""
    threads: int


@dataclass
class Stopwatch:
    """Takes the time at the end of every step. Made when the libraries are loaded and no model is."""

    before_mb: float = field(default_factory=lambda: peak_mb())
    peak_mb: float = 0.0
    ends: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)

    def lap(self) -> None:
        """A step has ended."""
        self.ends.append(time.perf_counter())
        self.peak_mb = peak_mb()

    def result(self, task: Task, threads: int) -> Measurement:
        """What was measured, from the end of the last step that is left out."""
        ends = self.ends[task.skipped - 1 :]
        assert len(ends) == task.steps + 1, f"{len(self.ends)} steps in place of {task.updates}"
        length = sum(self.lengths) / len(self.lengths) if self.lengths else None
        growth = self.peak_mb - self.before_mb
        seconds = [end - start for start, end in pairwise(ends)]
        return Measurement(seconds, length, self.peak_mb, growth, threads)


def pass_updates(steps: int) -> int:
    """Steps in a pass over the pairs of `dpo_later`, of which `steps` later ones are measured: most of two passes."""
    return (steps + 2) // 2


def median(values: Sequence[float]) -> float:
    """The middle value; of an even number the mean of the middle two."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def peak_mb() -> float:
    """The most memory that this process has had resident so far, in megabytes (10^6 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
