"""The keys and values of every row that is being decoded, in memory that is taken once.

A row lives in a slot and its tokens stand from position 0 on, whatever its neighbours' lengths. Active rows fill the
first slots, so attention reads a slice and nothing is copied but the rows that change their slot.

Shapes: L layers, S slots, T positions, K key-value heads, D head size, B active rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class KeyValueCache:
    """Keys (rotated) and values, (L, S, T, 2, K, D); what stands beyond a row's length is never read."""

    def __init__(
        self, layers: int, slots: int, positions: int, heads: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        # zeros: what is masked is still multiplied by zero, and zero times garbage may be NaN
        self.content = torch.zeros((layers, slots, positions, 2, heads, size), dtype=dtype, device=device)
        self.positions = positions
        self._tokens = self.content.view(layers, slots * positions, 2 * heads * size)
        self._columns = torch.arange(positions, device=device)
        self._starts = torch.arange(slots, device=device) * positions

    def fill(self, slot: int, prompt: Tensor) -> None:
        """Put the keys and values (L, P, 2, K, D) of a prompt at the beginning of a slot."""
        self.content[:, slot, : prompt.shape[1]] = prompt

    def places(self, lengths: Tensor) -> Tensor:
        """Where the next tokens (B,) of the first slots are written, for `append`."""
        return self._starts[: len(lengths)] + lengths

    def append(self, layer: int, places: Tensor, tokens: Tensor) -> None:
        """Write one token's keys and values (B, 2KD) for each of the first slots."""
        self._tokens[layer].index_copy_(0, places, tokens)

    def read(self, layer: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, width, D) of the first slots, as views."""
        content = self.content[layer, :rows, :width].transpose(1, 3)  # (B, K, 2, width, D)
        return content[:, :, 0], content[:, :, 1]

    def visible(self, lengths: Tensor, dtype: torch.dtype) -> tuple[int, Tensor | None]:
        """How many columns attention reads once each row has one token more than `lengths` (B,), and its mask.

        The mask (B, 1, 1, width) is added to the scores; there is none when all rows are equally long.
        """
        shortest, longest = torch.stack(torch.aminmax(lengths)).tolist()
        width = longest + 1
        if shortest == longest:
            return width, None
        hidden = self._columns[:width] > lengths[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device).masked_fill_(hidden, float("-inf"))
        return width, mask[:, None, None]

    def move(self, sources: Sequence[int], targets: Sequence[int], width: int) -> None:
        """Copy the first `width` positions of slots to other slots."""
        for source, target in zip(sources, targets, strict=True):
            self.content[:, target, :width] = self.content[:, source, :width]
