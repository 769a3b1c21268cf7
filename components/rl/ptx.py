"""The SFT loss mixed into every update (PTX), against forgetting what the demonstrations taught."""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.artifacts import Metrics
from components.models import device
from components.phases import Phases
from components.records import Demonstration
from components.rl.functional import masked_sum
from components.rl.settings import PtxSettings
from components.rl.stream import Stream
from components.rl.types import Forward
from components.tokens import Tokenizer, encode_prompt, encode_response, pad
from components.updates import Updater


class Ptx:
    """Adds coef * mean token loss of some demonstrations to the gradient of an update (Ouyang et al. 2022, eq. 2).

    Which demonstrations an update gets depends on its number and the seed alone. The gradients are summed before
    they are clipped, so the mixed-in loss belongs to the update and makes no step of its own.
    """

    def __init__(
        self,
        settings: PtxSettings,
        demonstrations: Sequence[Demonstration],
        tokenizer: Tokenizer,
        max_prompt: int,
        max_response: int,
        seed: int,
        phases: Phases | None = None,
    ) -> None:
        self.phases = phases or Phases()
        self.settings, self.filler = settings, tokenizer.eos_token_id
        rows = [
            (
                encode_prompt(tokenizer, row.prompt)[-max_prompt:],
                encode_response(tokenizer, row.response)[:max_response],
            )
            for row in demonstrations
        ]
        self.stream = Stream(rows, seed)

    def backward(self, updater: Updater) -> Metrics:
        """Add the gradient for the update at hand."""
        rows = self.stream.batch(updater.update, self.settings.batch_size)
        with self.phases.phase("ptx", sum(len(prompt) + len(response) for prompt, response in rows)):
            return {"loss/ptx": self._mix_in(updater, rows)}

    def _mix_in(self, updater: Updater, rows: Sequence[tuple[list[int], list[int]]]) -> float:
        """Add the gradient of these rows, of which each process reads its share; gives their mean loss per token."""
        tokens = float(sum(len(response) for _, response in rows))
        size = -(-len(rows) // updater.ranks.size)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        found = 0.0
        for part, weight in updater.ranks.share(parts):
            loss = self._loss(updater, part)
            updater.backward(self.settings.coef * loss * weight, tokens)
            found += loss.item() * weight
        return updater.ranks.totals({"loss": (found, 0.0)})["loss"][0] / tokens

    def _loss(self, updater: Updater, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """The summed loss of some rows' response tokens."""
        prompt_ids, prompt_mask = pad([prompt for prompt, _ in rows], self.filler, side="left")
        ids, mask = pad([response for _, response in rows], self.filler)
        mask = mask.to(device())
        forward: Forward = updater.model(
            torch.cat([prompt_ids, ids], dim=1).to(device()),
            torch.cat([prompt_mask.to(device()), mask], dim=1),
            mask.shape[1],
            temperature=1.0,
            critics=False,
        )
        return -masked_sum(forward.logprobs, mask)
