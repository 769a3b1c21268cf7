"""Where the time of a run goes: seconds, tokens and peak memory of every phase.

Phases may lie inside one another: every moment belongs to the innermost, and what none claims to `other`, so that the
phases of a batch add up to its seconds, and each has the peak of its own moments.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import PAGESIZE, mmap
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch

from components.artifacts import Metrics

Phase = Literal[
    "waited", "weights", "prefill", "decode", "score", "reference", "read", "update", "ptx", "checkpoint", "other"
]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""In the order in which a batch goes through them."""
OTHER: Phase = "other"
MB = 1e6
PROBE = 16 << 20  # bytes: far above what a process gets and gives back meanwhile, and touched in milliseconds


class Memory(Protocol):
    """What this process computes with."""

    def peak(self) -> int:
        """The most bytes held at once since the last call."""
        ...


class DeviceMemory:
    """What PyTorch's tensors take up on this process's GPU."""

    def peak(self) -> int:
        """The most bytes held at once since the last call."""
        highest = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return highest


class ResidentMemory:
    """The resident memory of this process, as Linux counts it: what was given back to the kernel is not in it."""

    def __init__(self, process: Path) -> None:
        """`process` is its folder below /proc."""
        self.status, self.clear = process / "status", process / "clear_refs"

    def peak(self) -> int:
        """The most bytes held at once since the last call; takes 40 microseconds.

        Raises OSError or ValueError where the kernel does not tell, or does not start over.
        """
        _, _, after = self.status.read_bytes().partition(b"VmHWM:")
        kibibytes = int(after[: after.index(b"kB")])
        self.clear.write_bytes(b"5")  # the peak starts again at what is held now: proc(5)
        return kibibytes << 10


def measurable_memory(process: Path = Path("/proc/self")) -> Memory | None:
    """The memory whose peak can be told for each phase: the GPU's where there is one, else this process's.

    None where only the peak since the start of the process is known, which would be said of phases that it is not of.
    """
    if torch.cuda.is_available():
        torch.cuda.init()
        return DeviceMemory()
    memory = ResidentMemory(process)
    try:
        memory.peak()
        _hold(PROBE)
        risen, fallen = memory.peak(), memory.peak()
    except (OSError, ValueError):
        return None
    return memory if risen - fallen > PROBE / 2 else None


def _hold(size: int) -> None:
    """Have so many bytes resident for a moment, past the allocator, which might keep them."""
    with mmap(-1, size) as held:
        for place in range(0, size, PAGESIZE):
            held[place] = 1


def now() -> float:
    """Seconds, read when the GPU, where one is in use, has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Phases:
    """Measures the phases of one batch after the other.

    Where a phase begins or ends the clock is read and, where `memory` is given, its peak: microseconds on a CPU; a
    GPU's queue runs empty there.
    """

    def __init__(self, memory: Memory | None = None, clock: Callable[[], float] = now) -> None:
        """A process has one peak: of all the objects in it that measure, one alone may be given `memory`."""
        self._memory, self._clock = memory, clock
        self._inside: list[Phase] = [OTHER]
        self._forget()
        self._since = clock()
        if memory:
            memory.peak()

    @contextmanager
    def phase(self, name: Phase, tokens: int = 0) -> Iterator[None]:
        """What is done inside belongs to this phase, which deals with so many tokens."""
        self._settle()
        self._inside.append(name)
        self.count(name, tokens)
        try:
            yield
        finally:
            self._settle()
            self._inside.pop()

    def count(self, name: Phase, tokens: int) -> None:
        """Add tokens that a phase deals with, where their number is not known before."""
        self._tokens[name] = self._tokens.get(name, 0) + tokens

    def lap(self) -> Metrics:
        """What was measured since the last lap, of each phase that there was.

        `perf/<phase>_s` in seconds, `perf/<phase>_tokens_per_s` where it dealt with tokens, `perf/<phase>_peak_mb` in
        10^6 bytes where memory is measured; and `perf/seconds`, the time since the last lap, which is the sum of all
        seconds.
        """
        self._settle()
        metrics = {}
        for name in sorted(self._seconds, key=PHASES.index):
            seconds, tokens = self._seconds[name], self._tokens.get(name, 0)
            metrics[f"perf/{name}_s"] = seconds
            metrics |= {f"perf/{name}_tokens_per_s": tokens / seconds} if tokens and seconds else {}
            metrics |= {f"perf/{name}_peak_mb": self._peaks[name] / MB} if name in self._peaks else {}
        metrics["perf/seconds"] = sum(self._seconds.values())
        self._forget()
        return metrics

    def _settle(self) -> None:
        """What was measured since the last change belongs to the phase at hand."""
        name, at = self._inside[-1], self._clock()
        self._seconds[name] = self._seconds.get(name, 0.0) + at - self._since
        self._since = at
        if self._memory:
            self._peaks[name] = max(self._peaks.get(name, 0), self._memory.peak())

    def _forget(self) -> None:
        self._seconds: dict[Phase, float] = {}
        self._tokens: dict[Phase, int] = {}
        self._peaks: dict[Phase, int] = {}
