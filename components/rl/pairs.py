"""Labelled pairs as batches: what DPO learns from in place of rollouts.

Shapes: B rows (chosen and rejected in turn), P prompt tokens (padded left), R response tokens (padded right).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from components.models import device
from components.records import Preference
from components.rl.reference import Reference
from components.rl.stream import Stream
from components.rl.types import Batch, micro_rows
from components.tokens import Tokenizer, encode_prompt, encode_response, pad


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A prompt and two responses as token ids, end-of-sequence included."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    cut: int
    """How many of the two responses lost their end to the length limit."""


def encode_pairs(
    preferences: Sequence[Preference], tokenizer: Tokenizer, max_prompt: int, max_response: int
) -> list[EncodedPair]:
    """Preferences as token ids: prompts keep their last tokens, responses their first.

    A response that had to be cut lacks its end-of-sequence token, as one that the policy did not end.
    """
    pairs = []
    for row in preferences:
        prompt = encode_prompt(tokenizer, row.prompt)[-max_prompt:]
        chosen, rejected = (encode_response(tokenizer, text) for text in (row.chosen, row.rejected))
        cut = (len(chosen) > max_response) + (len(rejected) > max_response)
        pairs.append(EncodedPair(prompt, chosen[:max_response], rejected[:max_response], cut))
    return pairs


class PairSource:
    """Batches of labelled pairs with the reference's log-probabilities."""

    def __init__(
        self, stream: Stream[EncodedPair], reference: Reference, tokenizer: Tokenizer, size: int, micro: int
    ) -> None:
        self.stream, self.reference, self.filler = stream, reference, tokenizer.eos_token_id
        self.size, self.micro = size, micro
        self.rows_per_batch = 2 * size

    def batch(self, number: int) -> Batch:
        """Pairs of batch `number` (0-based), in units of chosen and rejected."""
        pairs = self.stream.batch(number, self.size)
        prompts = [pair.prompt for pair in pairs for _ in range(2)]
        responses = [response for pair in pairs for response in (pair.chosen, pair.rejected)]
        prompt_ids, prompt_mask = pad(prompts, self.filler, side="left")
        ids, mask = pad(responses, self.filler)
        input_ids = torch.cat([prompt_ids, ids], dim=1).to(device())
        attention_mask = torch.cat([prompt_mask, mask], dim=1).to(device())
        mask = mask.to(device())
        parts = micro_rows(attention_mask, self.micro, 2)
        logprobs = self.reference.logprobs(input_ids, attention_mask, mask.shape[1], 1.0, parts)
        metrics = {
            "data/passes": (number + 1) * self.size / len(self.stream.rows),
            "data/cut_responses": sum(pair.cut for pair in pairs) / len(responses),
            "data/length": float(mask.sum(1).float().mean()),
        }
        ref_logprobs = logprobs.masked_fill(~mask, 0.0)
        return Batch(input_ids, attention_mask, mask, ref_logprobs=ref_logprobs, unit=2, metrics=metrics)

    def state(self) -> dict[str, Tensor]:
        """Nothing: the pairs of a batch follow from its number."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Nothing to take back."""
