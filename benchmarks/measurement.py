"""What is measured of a training run, ours or the peer's: the ends of its steps and its memory.

Loads no torch: the parent of the measured processes uses it too, and Linux counts a parent's memory in the peak of
the children that it forks.
"""

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

WORK = {"rloo": "RLOO", "grpo": "GRPO", "online_dpo": "Online DPO", "dpo": "DPO",
        "dpo_later": "DPO after the first epoch", "reward": "reward", "sft": "SFT"}  # fmt: skip
"""What a step can be of, and how the table calls it."""
SAMPLING = ("rloo", "grpo", "online_dpo")
"""The work that samples responses; the rest learns from rows that are there."""
LEARNING_RATE, KL_COEF = 1e-5, 0.05


@dataclass(frozen=True)
class Load:
    """How much a step takes in."""

    rows: int = 16
    """Sequences (sft) or pairs (reward, dpo) in a step."""
    responses: int = 32
    """Responses sampled in a step (rloo, grpo, online_dpo)."""
    prompt_tokens: int = 64
    """Of the prompts of those responses."""
    response_tokens: int = 64
    """Of those responses, at most; random weights seldom sample the end."""
    max_length: int = 256
    """Tokens of a sequence, prompt and response together (sft, reward, dpo)."""
    micro: int = 16
    """Rows of full length that ours takes through a model at once, the default of `rl.micro_batch_size`."""
    decoded: int = 64
    """Responses that ours decodes at once, the default of `rl.generation.batch_size`."""

    @property
    def pair_parts(self) -> int:
        """Micro-batches in a step of ours that learns from pairs without rl."""
        return max(1, 2 * self.rows // self.micro)

    @property
    def options(self) -> list[str]:
        """The command line of a process with this load."""
        return [text for name, value in asdict(self).items() for text in (f"--{name.replace('_', '-')}", str(value))]

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Let the parser read `options`."""
        for item in fields(Load):
            parser.add_argument(f"--{item.name.replace('_', '-')}", type=int, default=item.default)

    @classmethod
    def taken(cls, given: dict[str, Any]) -> "Load":
        """The load that was read, taken out of the values."""
        return cls(**{item.name: given.pop(item.name) for item in fields(cls)})


STANDARD = Load()


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
    load: Load = STANDARD
    device: str = "cpu"

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

    @property
    def arguments(self) -> list[str]:
        """The command line of a process with this task."""
        named = {"--size": self.size, "--dtype": self.dtype, "--steps": str(self.steps), "--device": self.device}
        return [self.what, str(self.folder), *(text for pair in named.items() for text in pair), *self.load.options]

    @classmethod
    def parse(cls, description: str | None, arguments: Sequence[str] | None = None) -> "Task":
        """The task that the command line names."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("what", choices=WORK)
        parser.add_argument("folder", type=Path, help="made by workload.py for as many steps of the same load")
        parser.add_argument("--size", default="7m")
        parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
        parser.add_argument("--steps", type=int, default=7, help="that are measured")
        parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
        Load.add_options(parser)
        given = vars(parser.parse_args(arguments))
        load = Load.taken(given)
        return cls(**given, load=load)


@dataclass(frozen=True)
class Measurement:
    """What one process measured of its own training."""

    seconds: list[float]
    """Of every measured step, generation and the making of the batch included."""
    response_tokens: float | None
    """Mean tokens of the sampled responses; None where nothing is sampled, or where the trainer does not tell."""
    peak_mb: float
    """The most memory until the end of the last step: resident, or on a GPU that of its tensors."""
    growth_mb: float
    """How far that is above what it was with all libraries loaded and no model yet."""
    threads: int
    reserved_mb: float | None = None
    """On a GPU, the most memory that torch had taken for tensors to come."""


@dataclass
class Stopwatch:
    """Takes the time at the end of every step. Made when the libraries are loaded and no model is."""

    before_mb: float = field(default_factory=lambda: peak_mb())
    peak_mb: float = 0.0
    reserved_mb: float | None = None
    ends: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    ahead_s: float = 0.0
    """Seconds that were spent for all steps at once, before those that are measured."""

    def lap(self) -> None:
        """A step has ended."""
        self.ends.append(time.perf_counter())
        self.peak_mb = peak_mb()

    def result(self, task: Task, threads: int) -> Measurement:
        """What was measured, from the end of the last step that is left out; each step with its share of `ahead_s`."""
        ends = self.ends[task.skipped - 1 :]
        assert len(ends) == task.steps + 1, f"{len(self.ends)} steps in place of {task.updates}"
        length = sum(self.lengths) / len(self.lengths) if self.lengths else None
        growth = self.peak_mb - self.before_mb
        seconds = [end - start + self.ahead_s / task.updates for start, end in pairwise(ends)]
        return Measurement(seconds, length, self.peak_mb, growth, threads, self.reserved_mb)


class GpuStopwatch(Stopwatch):
    """A stopwatch that waits for the GPU at the end of a step, and reads its memory."""

    def __init__(self) -> None:
        super().__init__(before_mb=0.0)

    def lap(self) -> None:
        """A step has ended."""
        import torch

        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.peak_mb = torch.cuda.max_memory_allocated() / 1e6
        self.reserved_mb = torch.cuda.max_memory_reserved() / 1e6


def stopwatch(device: str) -> Stopwatch:
    """The stopwatch for work on `device`, cpu or cuda."""
    return GpuStopwatch() if device == "cuda" else Stopwatch()


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
