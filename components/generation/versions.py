"""Numbered copies of weights in memory that two processes share: one writes, the other reads.

The memory has no name: it is gone with the last process that holds it, however that ends, and a container's limit on
/dev/shm does not apply to it.
"""

import math
import mmap
import os
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from typing import IO, Any

import torch
from torch import Tensor

STAMP_BYTES = 8


class Versions:
    """The latest copies of some float32 tensors; a copy is never changed, but after `slots` more it is replaced."""

    def __init__(self, weights: Sequence[Tensor], slots: int) -> None:
        """Memory for `slots` copies of tensors like these."""
        assert weights and slots > 0 and all(tensor.dtype == torch.float32 for tensor in weights)
        self._shapes, self._slots = [tuple(tensor.shape) for tensor in weights], slots
        self._map(_nameless_file(slots * (STAMP_BYTES + 4 * sum(map(math.prod, self._shapes)))))
        self._stamps.fill_(-1)

    def write(self, version: int, weights: Sequence[Tensor]) -> None:
        """Keep a copy of the tensors as `version` (from 0 on); it takes the place of the one `slots` before it."""
        slot = version % self._slots
        self._stamps[slot] = -1
        for copy, tensor in zip(self._copies[slot], weights, strict=True):
            copy.copy_(tensor.detach())
        self._stamps[slot] = version

    def read(self, version: int, weights: Sequence[Tensor]) -> None:
        """Make the tensors those of `version`, in place."""
        slot = version % self._slots
        for tensor, copy in zip(weights, self._copies[slot], strict=True):
            tensor.detach().copy_(copy)
        assert self._stamps[slot] == version, f"version {version} was asked for, {int(self._stamps[slot])} is there"

    def _map(self, file: IO[bytes]) -> None:
        self._file, memory = file, mmap.mmap(file.fileno(), 0)
        self._stamps = torch.frombuffer(memory, dtype=torch.int64, count=self._slots)
        numbers = torch.frombuffer(memory, dtype=torch.float32, offset=STAMP_BYTES * self._slots)
        sizes = [math.prod(shape) for shape in self._shapes]
        self._copies = [
            [part.view(shape) for part, shape in zip(copy.split(sizes), self._shapes, strict=True)]
            for copy in numbers.view(self._slots, -1)
        ]

    def __getstate__(self) -> dict[str, Any]:
        """What a process that is being started is given: the same memory."""
        return {"shapes": self._shapes, "slots": self._slots, "file": DupFd(self._file.fileno())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._shapes, self._slots = state["shapes"], state["slots"]
        self._map(os.fdopen(state["file"].detach(), "r+b", buffering=0))


def _nameless_file(size: int) -> IO[bytes]:
    """A file of `size` zeros without a name; in memory where the system has that."""
    file: IO[bytes]
    if sys.platform == "linux":
        file = os.fdopen(os.memfd_create("plumbline"), "r+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    file.truncate(size)
    return file
