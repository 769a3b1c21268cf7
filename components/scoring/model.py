"""Scores from a reward or cost model's folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from components.artifacts import Metrics
from components.batches import length_batches
from components.generation import Response
from components.models import load_scalar
from components.packed import Packed, Row, pack
from components.ranks import ALONE, Ranks
from components.records import Conversation
from components.scoring.scorer import checked
from components.tokens import cut_to_length, encode_prompt, encode_response, load_tokenizer


class ScalarReader(Protocol):
    """What computes the scores: a scalar model, or one that shares the policy's backbone."""

    model: Any
    """The Hugging Face model that reads."""

    def __call__(self, packed: Packed, places: Tensor) -> Tensor:
        """Normalised scores (N,) at some places of what is read."""
        ...


class ModelScorer:
    """A scalar model with its own tokenizer and template: texts are encoded anew, whatever sampled them.

    A response that the policy ended carries the end-of-sequence token, as in the model's training data; one that
    was cut does not.
    """

    def __init__(
        self,
        model: ScalarReader,
        tokenizer: Any,
        max_length: int,
        batch_tokens: int = 16384,
        name: str = "the model",
        ranks: Ranks = ALONE,
    ) -> None:
        """Of several `ranks` each is asked for all rows, and reads some of their batches: as many as any other."""
        self.model, self.tokenizer, self.ranks = model, tokenizer, ranks
        self.max_length, self.batch_tokens, self.name = max_length, batch_tokens, name
        self.metrics: Metrics = {}

    @torch.no_grad()
    def score(self, prompts: Sequence[Conversation], responses: Sequence[Response]) -> Tensor:
        """Normalised scores (B,) at the last token of each response."""
        rows = list[Row]()
        for prompt, response in zip(prompts, responses, strict=True):
            tokens = encode_response(self.tokenizer, response.text, response.ended)
            head, tail = cut_to_length(encode_prompt(self.tokenizer, prompt), tokens, self.max_length)
            rows.append(Row(tuple(head), tuple(tail)))
        places = {row: place for place, row in enumerate(dict.fromkeys(rows))}  # equal rows have equal scores
        different, scores = list(places), torch.zeros(len(places))

        def read(batch: list[int]) -> Tensor:
            packed = pack(self.model.model, [different[index] for index in batch])
            return self.model(packed, packed.ends)

        batches = length_batches(_longest_of_prompt(different), self.batch_tokens)
        for batch, found in zip(batches, self.ranks.spread(batches, read), strict=True):
            scores[batch] = found.cpu()
        return checked(scores[[places[row] for row in rows]], prompts, self.name)


def _longest_of_prompt(rows: Sequence[Row]) -> list[int]:
    """For each row the tokens of the longest row with its prompt: sorted by it, those of one prompt stay together."""
    longest: dict[Sequence[int], int] = {}
    for row in rows:
        longest[row.prompt] = max(longest.get(row.prompt, 0), len(row.prompt) + len(row.response))
    return [longest[row.prompt] for row in rows]


def load_scorer(folder: Path, dtype: str = "fp32", ranks: Ranks = ALONE) -> ModelScorer:
    """The scorer in a reward or cost model's folder, its weights in `dtype`; `ranks` share its batches."""
    return as_scorer(load_scalar(folder, dtype), folder, ranks=ranks)


def as_scorer(model: ScalarReader, folder: Path, max_length: int = 2048, ranks: Ranks = ALONE) -> ModelScorer:
    """A model with the tokenizer in `folder`; sequences are cut at `max_length` or what the model can hold."""
    longest = getattr(model.model.config, "max_position_embeddings", max_length)
    return ModelScorer(model, load_tokenizer(folder), min(max_length, longest), name=str(folder), ranks=ranks)
