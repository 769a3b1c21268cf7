"""Scores from a URL: any server that speaks this protocol.

Each request is a POST of JSON with the rows of a batch, column by column:

    {"prompts": [[{"role": "user", "content": "..."}], ...], "responses": ["...", ...], "ended": [true, ...]}

`ended` is false where a response was cut at the length limit. The answer has status 200 and one number per row, in
their order:

    {"scores": [0.25, ...]}

A server in trouble is asked again; `components/endpoint.py` says when, and where a token is read from.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import httpx
import torch
from torch import Tensor

from components.artifacts import Metrics
from components.endpoint import Endpoint
from components.errors import InputError
from components.generation import Response
from components.records import Conversation
from components.scoring.scorer import Role, checked
from components.settings import UrlScorerSettings

EXPECTED = 'a JSON object {"scores": [...]} with one number per response'


class RemoteScorer:
    """A server that scores responses."""

    def __init__(self, settings: UrlScorerSettings, role: Role) -> None:
        """Raises InputError when the settings name a token that is not in the environment."""
        self.settings, self.endpoint = settings, Endpoint(settings, f"rl.{role}_scorer")
        self.name = self.endpoint.name
        self.metrics: Metrics = {}

    def score(self, prompts: Sequence[Conversation], responses: Sequence[Response]) -> Tensor:
        """The server's scores (B,). Raises InputError for a server that fails or answers in another form."""
        scores: list[float] = []
        with self.endpoint.client() as client:
            for start in range(0, len(responses), self.settings.batch_size):
                part = slice(start, start + self.settings.batch_size)
                payload = _payload(prompts[part], responses[part])
                scores += self._scores(self.endpoint.ask(client, EXPECTED, "POST", json=payload), responses[part])
        return checked(torch.tensor(scores), prompts, self.name)

    def _scores(self, answer: httpx.Response, responses: Sequence[Response]) -> list[float]:
        """The numbers of an answer. Raises InputError for another status or form."""
        shown = self.endpoint.shown(answer)
        if not answer.is_success:
            raise InputError(f"{self.name} answered {shown}. Expected: status 200 and {EXPECTED}.")
        try:
            body = answer.json(parse_int=float)
        except ValueError:
            body = None
        scores = body.get("scores") if isinstance(body, dict) else None
        if not isinstance(scores, list) or not all(isinstance(score, float) for score in scores):
            raise InputError(f"{self.name} answered {shown}. Expected: {EXPECTED}.")
        if len(scores) != len(responses):
            raise InputError(
                f"{self.name} gave back {len(scores)} scores for {len(responses)} responses. Expected: {EXPECTED}."
            )
        return scores


def _payload(prompts: Sequence[Conversation], responses: Sequence[Response]) -> dict[str, Any]:
    return {
        "prompts": [[asdict(message) for message in prompt] for prompt in prompts],
        "responses": [response.text for response in responses],
        "ended": [response.ended for response in responses],
    }
