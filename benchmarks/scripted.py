"""A maker of results that does as it is told: it waits, dies, or gives back the weights that it has.

Tests have it work in a process of its own, which must find it by its name.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.artifacts import Metrics
from components.errors import InputError
from components.generation.overlap import Overlap
from components.generation.versions import Versions
from components.settings import OverlapSettings

ENDLESS_S = 600.0


class Scripted:
    """Counts the results it made, and gives back that count and its weights."""

    def __init__(self, folder: Path, script: Mapping[int, str]) -> None:
        """`script` says by number what it does first, the first time alone where that ends in "once"."""
        self.folder, self.script = folder, script
        self.weights: Sequence[Tensor] = [torch.zeros(3), torch.zeros(2, 2)]
        self.count = torch.zeros(())

    def make(self, number: int) -> tuple[dict[str, Tensor], Metrics]:
        """The count and the weights."""
        begun = self.folder / f"begun {number}"
        again = begun.exists()
        begun.write_text(str(os.getpid()))
        what, _, once = self.script.get(number, "").partition(" ")
        if what and not (once and again):
            getattr(self, what)(number)
        self.count = self.count + 1
        weights = {str(place): value for place, value in enumerate(self.weights)}
        return {"count": self.count, **weights}, {"made": number}

    def state(self) -> dict[str, Tensor]:
        """The count."""
        return {"count": self.count}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.count = state["count"]

    def stay(self, number: int) -> None:
        """Wait until there is a file that says to go on."""
        while not (self.folder / f"go {number}").exists():
            time.sleep(0.005)

    def hang(self, number: int) -> None:
        """Do not come back."""
        time.sleep(ENDLESS_S)

    def die(self, number: int) -> None:
        """As one that the system ends for want of memory."""
        print(f"last words of {number}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def refuse(self, number: int) -> None:
        """Something that a person can fix."""
        raise InputError(f"number {number} is odd; give an even one.")

    def fail(self, number: int) -> None:
        """Anything else."""
        raise ZeroDivisionError(f"number {number}")


def scripted(folder: Path, script: Mapping[int, str], **settings: Any) -> Overlap:
    """A process with a `Scripted`; its weights have as many versions as stay with that staleness."""
    made = OverlapSettings(**settings)
    versions = Versions([torch.zeros(3), torch.zeros(2, 2)], made.staleness + 1)
    overlap = Overlap(partial(Scripted, folder, script), versions, made)
    overlap.start_state = {"count": torch.zeros(())}
    return overlap
