"""The keys and values of every row that is being decoded, in memory that is taken once.

A row lives in a slot and its tokens stand from position 0 on, whatever its neighbours' lengths. Active rows fill the
first slots, so attention reads a slice and nothing is copied but the rows that change their slot.

Shapes: L layers, S slots, T positions, K key-value heads, G query heads for each, D head size, B active rows.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class KeyValueCache:
    """Keys (rotated) and values, (L, 2, S, K, T, D); what stands beyond a row's length is never read."""

    def __init__(
        self, layers: int, slots: int, positions: int, heads: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        # zeros: what is masked is still multiplied by zero, and zero times garbage may be NaN
        self.content = torch.zeros((layers, 2, slots, heads, positions, size), dtype=dtype, device=device)
        self.positions = positions
        self._tokens = self.content.view(layers, -1, size)
        self._columns = torch.arange(positions, device=device)
        parts = torch.arange(2 * slots * heads, device=device).view(2, slots, heads)
        self._starts = parts.transpose(0, 1) * positions  # (S, 2, K)

    def fill(self, slot: int, prompt: Tensor) -> None:
        """Put the keys and values (L, P, 2, K, D) of a prompt at the beginning of a slot."""
        self.content[:, :, slot, :, : prompt.shape[1]] = prompt.permute(0, 2, 3, 1, 4)

    def places(self, lengths: Tensor) -> Tensor:
        """Where the next tokens (B,) of the first slots are written, for `append`."""
        return (self._starts[: len(lengths)] + lengths[:, None, None]).flatten()

    def append(self, layer: int, places: Tensor, tokens: Tensor) -> None:
        """Write one token's keys and values (B, 2KD) for each of the first slots."""
        self._tokens[layer].index_copy_(0, places, tokens.reshape(len(places), -1))

    def read(self, layer: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, width, D) of the first slots, as views."""
        keys, values = self.content[layer, :, :rows, :, :width]
        return keys, values

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
            self.content[:, :, target, :, :width] = self.content[:, :, source, :, :width]


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """What the queries (B, K, G, D) of a token take from its row's `values` (B, K, T, D): (B, K, G, D).

    The G query heads that share a key-value head stand where other attention has several queries. On CPUs two
    products in float32 take half the time of torch's kernel for attention; in bfloat16 it is the other way round.
    """
    if keys.dtype != torch.float32 or keys.device.type != "cpu":
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    scores = torch.matmul(queries * queries.shape[-1] ** -0.5, keys.transpose(2, 3))
    if mask is not None:
        scores += mask
    return torch.matmul(scores.softmax(-1), values)
