"""Next-token likelihood: the loss of pre-training and of supervised fine-tuning, and its evaluation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from components.artifacts import Metrics
from components.batches import length_batches
from components.logprobs import LanguageModel, Tokens
from components.packed import Row
from components.ranks import ALONE, Ranks
from components.records import Demonstration
from components.tokens import Tokenizer, cut_to_length, encode_prompt, encode_response
from components.training import Loss


@dataclass(frozen=True, slots=True)
class Passage:
    """Token ids, of which those from `start` on are learned."""

    ids: list[int]
    start: int
    """Index of the first learned token, at least 1: nothing predicts the very first."""


def demonstration_passages(
    demonstrations: Sequence[Demonstration], tokenizer: Tokenizer, max_length: int
) -> list[Passage]:
    """Each demonstration as token ids of which the response, closed by end-of-sequence, is learned."""
    passages = []
    for row in demonstrations:
        prompt, response = cut_to_length(
            encode_prompt(tokenizer, row.prompt), encode_response(tokenizer, row.response), max_length
        )
        passages.append(Passage(prompt + response, len(prompt)))
    return passages


class Likelihood:
    """Cross-entropy over the learned tokens of passages."""

    def length(self, row: Passage) -> int:
        """Tokens in the row."""
        return len(row.ids)

    def terms(self, row: Passage) -> int:
        """Learned tokens in the row."""
        return len(row.ids) - row.start

    def loss(self, model: nn.Module, rows: Sequence[Passage]) -> Loss:
        """Summed negative log-likelihood of the learned tokens, and how many were the likeliest.

        `model` is a `LanguageModel`.
        """
        tokens: Tokens = model([Row(row.ids[: row.start], row.ids[row.start :]) for row in rows])
        return Loss(-tokens.logprobs.sum(), {"train/token_accuracy": float(tokens.likeliest.sum())})


@torch.no_grad()
def evaluate_likelihood(
    model: LanguageModel, rows: Sequence[Passage], batch_tokens: int, ranks: Ranks = ALONE
) -> Metrics:
    """Loss per learned token, perplexity and share of tokens predicted, over held-out passages.

    Each of the `ranks` reads some of them, and all have the result.
    """
    if not rows:
        return {}
    objective = Likelihood()
    model.eval()

    def read(batch: list[int]) -> tuple[float, float]:
        loss = objective.loss(model, [rows[index] for index in batch])
        return loss.total.item(), loss.sums["train/token_accuracy"]

    batches = length_batches([objective.length(row) for row in rows], batch_tokens)
    terms = sum(map(objective.terms, rows))
    total, right = map(sum, zip(*ranks.spread(batches, read), strict=True))
    mean = total / terms
    return {"eval/loss": mean, "eval/perplexity": math.exp(min(mean, 50.0)), "eval/token_accuracy": right / terms}
