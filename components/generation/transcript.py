"""What has been sampled so far: every row's tokens, their log-probabilities, and where each row stands.

Both ways of decoding write here, so that a row's draws, its end and its limit are decided in one place.

Shapes: N rows of the whole call (prompt-major), R response tokens at most, B the rows that are decoded at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.generation import Samples
from components.generation.picking import pick
from components.settings import Generation


class Transcript:
    """Responses in the making; a row's next token depends on its logits and on its own draws (R,) alone."""

    def __init__(self, draws: Tensor, generation: Generation, ends: Sequence[int], filler: int) -> None:
        """`draws` (N, R) uniform in [0, 1), on the device of the logits; a token in `ends` ends its row."""
        self.num_rows, self.length = draws.shape
        self._draws, self._generation = draws.view(-1), generation
        self._ends = torch.tensor(list(ends), device=draws.device)
        self._ids = torch.full((draws.numel(),), filler, device=draws.device)
        self._logprobs = torch.zeros(draws.numel(), device=draws.device)
        self._counts = torch.zeros(self.num_rows, dtype=torch.long, device=draws.device)
        self._ended = torch.zeros(self.num_rows, dtype=torch.bool, device=draws.device)

    def extend(self, rows: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Sample one more token for `rows` (B,) from `logits` (B, V): the tokens (B,), and which rows are over (B,).

        A row is over when it has ended or has R tokens; it must not be extended again.
        """
        counts = self._counts[rows]
        places = rows * self.length + counts
        tokens, logprobs = pick(logits, self._draws[places], self._generation)
        ended = (tokens[:, None] == self._ends).any(1)
        self._ids[places], self._logprobs[places] = tokens, logprobs
        self._counts[rows], self._ended[rows] = counts + 1, ended
        return tokens, ended | (counts + 1 == self.length)

    def over(self, rows: Tensor) -> Tensor:
        """Which of `rows` (B,) are over (B,)."""
        return self._ended[rows] | (self._counts[rows] == self.length)

    def samples(self) -> Samples:
        """All rows, cut to the longest."""
        used = int(self._counts.max())
        mask = torch.arange(used, device=self._counts.device) < self._counts[:, None]
        ids, logprobs = (flat.view(self.num_rows, self.length)[:, :used] for flat in (self._ids, self._logprobs))
        return Samples(ids, mask, logprobs, self._ended)
