"""Scores from a URL: any server that speaks this protocol.

Each request is a POST of JSON with the rows of a batch, column by column:

    {"prompts": [[{"role": "user", "content": "..."}], ...], "responses": ["...", ...], "ended": [true, ...]}

`ended` is false where a response was cut at the length limit. The answer has status 200 and one number per row, in
their order:

    {"scores": [0.25, ...]}

429, 5xx, a time-out and a broken connection are tried again after a wait that doubles each time, or the longer one
that the server asks for in Retry-After. Any other status is final. A token, where one is needed, is read from the
environment and sent as `Authorization: Bearer <token>`; it is never in settings, logs or messages.
"""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from torch import Tensor

from components.artifacts import Metrics
from components.errors import InputError
from components.generation import Response
from components.records import Conversation
from components.scoring.scorer import Role, checked
from components.settings import UrlScorerSettings

logger = logging.getLogger(__name__)

TOO_MANY_REQUESTS, SERVER_ERROR = 429, 500
MAX_WAIT_S = 300.0
"""The longest wait between two attempts, whatever a server asks for."""
SHOWN = 200  # characters of an answer in a message
EXPECTED = 'a JSON object {"scores": [...]} with one number per response'


class RemoteScorer:
    """A server that scores responses."""

    def __init__(self, settings: UrlScorerSettings, role: Role) -> None:
        """Raises InputError when the settings name a token that is not in the environment."""
        self.settings, self.name = settings, f"rl.{role}_scorer ({shown_address(settings.url)})"
        self.metrics: Metrics = {}
        self._token = _token(settings.token_env, f"rl.{role}_scorer.token_env")

    def score(self, prompts: Sequence[Conversation], responses: Sequence[Response]) -> Tensor:
        """The server's scores (B,). Raises InputError for a server that fails or answers in another form."""
        scores: list[float] = []
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        with httpx.Client(timeout=self.settings.timeout_s, headers=headers) as client:
            for start in range(0, len(responses), self.settings.batch_size):
                part = slice(start, start + self.settings.batch_size)
                scores += self._scores(self._post(client, _payload(prompts[part], responses[part])), responses[part])
        return checked(torch.tensor(scores), prompts, self.name)

    def _post(self, client: httpx.Client, payload: dict[str, Any]) -> httpx.Response:
        """The final answer to one batch. Raises InputError when every attempt fails."""
        attempts = self.settings.retries + 1
        for attempt in range(1, attempts + 1):
            asked_s = 0.0
            try:
                answer = client.post(self.settings.url, json=payload)
            except httpx.RequestError as error:
                reason = f"{type(error).__name__} {error}".strip()
            else:
                if answer.status_code != TOO_MANY_REQUESTS and answer.status_code < SERVER_ERROR:
                    return answer
                reason, asked_s = self._shown(answer), retry_after_s(answer)
            if attempt < attempts:
                wait_s = min(max(self.settings.backoff_s * 2 ** (attempt - 1), asked_s), MAX_WAIT_S)
                logger.warning("%s: %s; attempt %d of %d in %.1f s", self.name, reason, attempt + 1, attempts, wait_s)
                time.sleep(wait_s)
        raise InputError(
            f"{self.name} failed {attempts} times; the last time: {reason}. Expected: {EXPECTED}. See to the server, "
            "or raise timeout_s, retries or backoff_s."
        )

    def _scores(self, answer: httpx.Response, responses: Sequence[Response]) -> list[float]:
        """The numbers of an answer. Raises InputError for another status or form."""
        if not answer.is_success:
            raise InputError(f"{self.name} answered {self._shown(answer)}. Expected: status 200 and {EXPECTED}.")
        try:
            body = answer.json(parse_int=float)
        except ValueError:
            body = None
        scores = body.get("scores") if isinstance(body, dict) else None
        if not isinstance(scores, list) or not all(isinstance(score, float) for score in scores):
            raise InputError(f"{self.name} answered {self._shown(answer)}. Expected: {EXPECTED}.")
        if len(scores) != len(responses):
            raise InputError(
                f"{self.name} gave back {len(scores)} scores for {len(responses)} responses. Expected: {EXPECTED}."
            )
        return scores

    def _shown(self, answer: httpx.Response) -> str:
        """An answer's status and the start of its body, without the token should the server repeat it."""
        text = answer.text.replace(self._token, "***") if self._token else answer.text
        return f"status {answer.status_code}: {' '.join(text.split())[:SHOWN]!r}"


def shown_address(url: str) -> str:
    """A URL as messages show it: without user, password and query, which may hold secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{'?...' if parts.query else ''}"


def retry_after_s(answer: httpx.Response) -> float:
    """The seconds that the server asks to wait, given as a number or a date; 0 when it does not say."""
    stated = answer.headers.get("Retry-After", "").strip()
    if stated.isdecimal():
        return float(stated)
    try:
        date = parsedate_to_datetime(stated)
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _payload(prompts: Sequence[Conversation], responses: Sequence[Response]) -> dict[str, Any]:
    return {
        "prompts": [[asdict(message) for message in prompt] for prompt in prompts],
        "responses": [response.text for response in responses],
        "ended": [response.ended for response in responses],
    }


def _token(variable: str, key: str) -> str:
    """The token in an environment variable; empty without one. Raises InputError when it is not set or unfit."""
    if not variable:
        return ""
    token = os.environ.get(variable, "").strip()
    if not token:
        raise InputError(f"{key} is {variable}, an environment variable that is not set or empty. Set it to the token.")
    if not token.isascii() or not token.isprintable():
        raise InputError(f"{key} is {variable}, an environment variable that holds what no HTTP header may carry.")
    return token
