"""Labelled pairs as batches: what DPO learns from in place of rollouts.

Shapes: B rows (chosen and rejected in turn), P prompt tokens (padded left), R response tokens (padded right).
"""

import hashlib
import logging
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from components.batches import unit_batches
from components.checkpoints import Checkpoints
from components.errors import InputError
from components.models import device
from components.phases import Phases
from components.progress import Progress
from components.ranks import ALONE, Ranks
from components.records import Preference
from components.rl.reference import Reference
from components.rl.stream import Stream
from components.rl.types import Batch, State
from components.tokens import Tokenizer, encode_prompt, encode_response, pad

logger = logging.getLogger(__name__)


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

    def __init__(self, stream: Stream[EncodedPair], logprobs: "PairLogprobs", filler: int, size: int) -> None:
        self.stream, self.logprobs, self.filler, self.size = stream, logprobs, filler, size
        self.rows_per_batch = 2 * size

    def batch(self, number: int) -> Batch:
        """Pairs of batch `number` (0-based), in units of chosen and rejected."""
        indices = self.stream.indices(number, self.size)
        pairs = [self.stream.rows[index] for index in indices]
        padded = pad_pairs(pairs, self.filler)
        ref_logprobs = torch.zeros(padded.mask.shape).masked_scatter(
            padded.mask.cpu(), torch.cat([row for index in indices for row in self.logprobs.of(index)])
        )
        metrics = {
            "data/passes": (number + 1) * self.size / len(self.stream.rows),
            "data/cut_responses": sum(pair.cut for pair in pairs) / len(padded.mask),
            "data/length": float(padded.mask.sum(1).float().mean()),
        }
        return replace(padded, ref_logprobs=ref_logprobs.to(device()), metrics=metrics)

    def state(self) -> State:
        """Nothing: the pairs of a batch follow from its number."""
        return dict

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Nothing to take back."""

    def close(self) -> None:
        """Nothing to end."""


class PairLogprobs:
    """What the reference says of pairs: computed for all of them at once when first asked for, and kept.

    Every pass reads the same numbers, and so does every later start that finds them where `kept` says. The reference
    is in memory only while it reads; where its numbers are found it is not loaded.
    """

    def __init__(
        self,
        reference: Callable[[], Reference],
        pairs: Mapping[int, EncodedPair],
        filler: int,
        micro: int,
        kept: Checkpoints | None = None,
        phases: Phases | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Each of the `ranks` reads some of the pairs, and has what is said of all."""
        self.reference, self.pairs, self.filler, self.micro, self.kept = reference, pairs, filler, micro, kept
        self.phases, self.ranks = phases or Phases(), ranks
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, index: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities (R,) of the chosen and of the rejected response of a pair, on the CPU."""
        if not self.found:
            rows = self._read() or self._keep(self._computed())
            self.found = dict(zip(self.pairs, zip(rows[0::2], rows[1::2], strict=True), strict=True))
        return self.found[index]

    def _lengths(self) -> list[int]:
        return [len(response) for pair in self.pairs.values() for response in (pair.chosen, pair.rejected)]

    def _read(self) -> list[Tensor]:
        """What an earlier start kept; nothing where it kept none, or none that can be used."""
        try:
            checkpoint = self.kept.latest() if self.kept else None
        except InputError as error:
            logger.warning("%s The reference's log-probabilities are computed again.", error)
            return []
        if checkpoint is None:
            return []
        logger.info("what the reference says of %d pairs is read from %s", len(self.pairs), checkpoint.source)
        return list(checkpoint.tensors["logprobs"].split(self._lengths()))

    def _keep(self, rows: list[Tensor]) -> list[Tensor]:
        try:
            if self.kept:
                self.kept.save(0, {"logprobs": torch.cat(rows)}, {})
        except InputError as error:
            logger.warning("the reference's log-probabilities are not kept for later starts: %s", error)
        return rows

    def _computed(self) -> list[Tensor]:
        """Of every pair in turn, chosen and rejected."""
        pairs, found = list(self.pairs.values()), [torch.zeros(0)] * (2 * len(self.pairs))
        prompts = [len(pair.prompt) for pair in pairs for _ in range(2)]
        lengths = [prompt + response for prompt, response in zip(prompts, self._lengths(), strict=True)]
        reference, progress = self.reference(), Progress("reference", len(pairs))

        def read(rows: list[int]) -> list[Tensor]:
            padded = pad_pairs([pairs[row // 2] for row in rows[::2]], self.filler)
            width, every = padded.mask.shape[1], [torch.arange(len(rows))]
            with self.phases.phase("reference", int(padded.attention_mask.sum())):
                logprobs = reference.logprobs(padded.input_ids, padded.attention_mask, width, 1.0, every)
            progress.advance(len(rows) // 2)
            return [values[seen].float().cpu() for values, seen in zip(logprobs, padded.mask, strict=True)]

        batches = unit_batches(lengths, 2, self.micro * max(lengths))
        for rows, said in zip(batches, self.ranks.spread(batches, read), strict=True):
            for row, values in zip(rows, said, strict=True):
                found[row] = values
        return found


def pad_pairs(pairs: Sequence[EncodedPair], filler: int) -> Batch:
    """The pairs as padded rows on this process's device, chosen and rejected in turn."""
    prompt_ids, prompt_mask = pad([pair.prompt for pair in pairs for _ in range(2)], filler, side="left")
    ids, mask = pad([response for pair in pairs for response in (pair.chosen, pair.rejected)], filler)
    input_ids, attention_mask = torch.cat([prompt_ids, ids], dim=1), torch.cat([prompt_mask, mask], dim=1)
    return Batch(input_ids.to(device()), attention_mask.to(device()), mask.to(device()), unit=2)


def pairs_digest(pairs: Iterable[EncodedPair]) -> str:
    """A digest of the pairs' token ids, in their order."""
    digest = hashlib.sha256()
    for pair in pairs:
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            digest.update(array("q", [len(ids), *ids]).tobytes())
    return digest.hexdigest()
