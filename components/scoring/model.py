"""Scores from a reward or cost model's folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.artifacts import Metrics
from components.generation import Response
from components.models import ScalarModel, load_scalar
from components.records import Conversation
from components.scoring.scorer import checked
from components.tokens import cut_to_length, encode_prompt, encode_response, load_tokenizer, pad


class ModelScorer:
    """A scalar model with its own tokenizer and template: texts are encoded anew, whatever sampled them.

    A response that the policy ended carries the end-of-sequence token, as in the model's training data; one that
    was cut does not.
    """

    def __init__(
        self, model: ScalarModel, tokenizer: Any, max_length: int, batch_size: int = 64, name: str = "the model"
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.batch_size, self.name = max_length, batch_size, name
        self.metrics: Metrics = {}

    @torch.no_grad()
    def score(self, prompts: Sequence[Conversation], responses: Sequence[Response]) -> Tensor:
        """Normalised scores (B,) at the last token of each response."""
        rows = []
        for prompt, response in zip(prompts, responses, strict=True):
            tokens = encode_response(self.tokenizer, response.text, response.ended)
            head, tail = cut_to_length(encode_prompt(self.tokenizer, prompt), tokens, self.max_length)
            rows.append(head + tail)
        scores = torch.zeros(len(rows))
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        device = next(self.model.parameters()).device
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            ids, mask = pad([rows[index] for index in batch], self.tokenizer.eos_token_id)
            scores[batch] = self.model.score(ids.to(device), mask.to(device)).cpu()
        return checked(scores, prompts, self.name)


def load_scorer(folder: Path, max_length: int = 2048) -> ModelScorer:
    """The scorer in a reward or cost model's folder; sequences are cut at `max_length` or what the model can hold."""
    model = load_scalar(folder)
    longest = getattr(model.model.config, "max_position_embeddings", max_length)
    return ModelScorer(model, load_tokenizer(folder), min(max_length, longest), name=str(folder))
