"""Continuous batching: rows that are over leave their slots, and waiting prompts take their place.

Shapes: P prompts, S slots, B active rows, L layers, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from components.generation.llama import Llama
from components.generation.transcript import Transcript
from components.phases import Phases
from components.tokens import pad

MULTIPLE = 8
"""Rows are decoded in multiples of so many, some of them free slots: reading the weights takes the time, not the rows,
and code for every number of rows would be made anew (`components/products.py`)."""
PREFILL_TOKENS = 1024
"""Prompt tokens, padding included, that one forward pass reads; more of them are no faster per token."""


@dataclass(frozen=True)
class Prompted:
    """A row whose prompt has been read."""

    row: int
    keys_values: Tensor
    """(L, length, 2, K, D), shared by the rows of one prompt."""
    logits: Tensor
    """(V,) after the prompt."""


class WaitingList:
    """Rows that have no slot yet, shortest prompts first; each prompt is read once for all of its `k` rows."""

    def __init__(self, llama: Llama, prompts: Sequence[Sequence[int]], k: int, phases: Phases) -> None:
        self._llama, self._prompts, self._k, self._phases = llama, prompts, k, phases
        self._unread = deque(sorted(range(len(prompts)), key=lambda index: len(prompts[index])))
        self._read: deque[Prompted] = deque()

    def __bool__(self) -> bool:
        """Whether any row waits."""
        return bool(self._unread or self._read)

    def take(self, count: int) -> list[Prompted]:
        """The next rows, `count` of them or all there are."""
        while self._unread and len(self._read) < count:
            self._read_prompts()
        return [self._read.popleft() for _ in range(min(count, len(self._read)))]

    def _read_prompts(self) -> None:
        chosen = [self._unread.popleft()]
        # sorted, so the next prompt is the longest so far
        while self._unread and (len(chosen) + 1) * len(self._prompts[self._unread[0]]) <= PREFILL_TOKENS:
            chosen.append(self._unread.popleft())
        ids, mask = (tensor.to(self._llama.device) for tensor in pad([self._prompts[index] for index in chosen], 0))
        with self._phases.phase("prefill", sum(len(self._prompts[index]) for index in chosen)):
            logits, keys_values = self._llama.prefill(ids, mask.sum(1))
        for place, prompt in enumerate(chosen):
            own = keys_values[:, place, : len(self._prompts[prompt])]
            self._read += [Prompted(prompt * self._k + sample, own, logits[place]) for sample in range(self._k)]


class Slots:
    """The rows that are decoded together: row, length in the cache and last token of each slot (S,)."""

    def __init__(
        self, llama: Llama, waiting: WaitingList, transcript: Transcript, count: int, finished: Callable[[int], None]
    ) -> None:
        """`finished` is told how many rows came to their end."""
        self._llama, self._waiting, self._transcript, self._finished = llama, waiting, transcript, finished
        self._count, self._free = count, list(range(count))
        self._cache = llama.empty_cache(count)
        self._slots = torch.arange(count, device=llama.device)
        self._rows, self._lengths, self._tokens = (torch.zeros_like(self._slots) for _ in range(3))

    def run(self) -> None:
        """Decode until every row is over."""
        while self._waiting or len(self._free) < self._count:
            while self._free and self._waiting:
                self._admit()
            self._close_gaps()
            if active := self._count - len(self._free):
                self._step(active)

    def _admit(self) -> None:
        """Fill free slots with waiting rows, and sample their first tokens."""
        entries = self._waiting.take(len(self._free))
        chosen = [self._free.pop() for _ in entries]
        for slot, entry in zip(chosen, entries, strict=True):
            self._cache.fill(slot, entry.keys_values)
        slots = self._slots[chosen]
        self._rows[slots] = torch.tensor([entry.row for entry in entries], device=slots.device)
        lengths = [entry.keys_values.shape[1] for entry in entries]
        self._lengths[slots] = torch.tensor(lengths, device=slots.device)
        self._settle(slots, torch.stack([entry.logits for entry in entries]))

    def _close_gaps(self) -> None:
        """Move the last rows into free slots before them, so that active rows are the first."""
        active = self._count - len(self._free)
        targets = [slot for slot in self._free if slot < active]
        if not targets:
            return
        sources = sorted(set(range(active, self._count)) - set(self._free))
        self._cache.move(sources, targets, int(self._lengths[sources].max()))
        for state in (self._rows, self._lengths, self._tokens):
            state[targets] = state[sources]
        self._free = list(range(active, self._count))

    def _step(self, active: int) -> None:
        rows = min(-(-active // MULTIPLE) * MULTIPLE, self._count)
        self._lengths[active:rows] = 0  # what is decoded there is nobody's
        logits = self._llama.step(self._tokens[:rows], self._lengths[:rows], self._cache)[:active]
        self._lengths[:active] += 1
        self._settle(self._slots[:active], logits)

    def _settle(self, slots: Tensor, logits: Tensor) -> None:
        """Sample a token for each of `slots` (B,) from `logits` (B, V), and free the slots of rows that are over."""
        tokens, over = self._transcript.extend(self._rows[slots], logits)
        self._tokens[slots] = tokens
        freed = slots[over].tolist()
        if freed:
            self._free += freed
            self._finished(len(freed))
