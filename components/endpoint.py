"""A server that is asked over HTTP: tried again while it is in trouble, told of without its secrets.

429, 5xx, a time-out and a broken connection are tried again after a wait that doubles each time, or the longer one
that the server asks for in Retry-After. Any other status is final. A token, where one is needed, is read from the
environment and sent as `Authorization: Bearer <token>`; it is never in settings, logs or messages.
"""

import logging
import os
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx

from components.errors import InputError
from components.settings import ServerSettings

logger = logging.getLogger(__name__)

TOO_MANY_REQUESTS, SERVER_ERROR = 429, 500
MAX_WAIT_S = 300.0
"""The longest wait between two attempts, whatever a server asks for."""
SHOWN = 200  # characters of an answer in a message


class Endpoint:
    """A server under its address; safe to use from several threads."""

    def __init__(self, settings: ServerSettings, key: str) -> None:
        """`key` names the settings in messages. Raises InputError when they name a token that is not there."""
        self.settings, self.name = settings, f"{key} ({shown_address(settings.url)})"
        self._token = _token(settings.token_env, f"{key}.token_env")

    def client(self) -> httpx.Client:
        """Connections with the time-out and the token, closed at the end of a `with`."""
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        limits = httpx.Limits(max_connections=None)
        return httpx.Client(timeout=self.settings.timeout_s, headers=headers, limits=limits)

    def ask(
        self, client: httpx.Client, expected: str, method: str, path: str = "", json: Any = None
    ) -> httpx.Response:
        """The final answer to one request to the address with `path` behind it.

        Raises InputError, which says what was `expected`, when every attempt fails.
        """
        settings, attempts = self.settings, self.settings.retries + 1
        for attempt in range(1, attempts + 1):
            asked_s = 0.0
            try:
                answer = client.request(method, self._at(path), json=json)
            except httpx.RequestError as error:
                reason = f"{type(error).__name__} {error}".strip()
            else:
                if answer.status_code != TOO_MANY_REQUESTS and answer.status_code < SERVER_ERROR:
                    return answer
                reason, asked_s = self.shown(answer), retry_after_s(answer)
            if attempt < attempts:
                wait_s = min(max(settings.backoff_s * 2 ** (attempt - 1), asked_s), MAX_WAIT_S)
                logger.warning("%s: %s; attempt %d of %d in %.1f s", self.name, reason, attempt + 1, attempts, wait_s)
                time.sleep(wait_s)
        raise InputError(
            f"{self.name}{path} failed {attempts} times; the last time: {reason}. Expected: {expected}. See to the "
            "server, or raise timeout_s, retries or backoff_s."
        )

    def shown(self, answer: httpx.Response) -> str:
        """An answer's status and the start of its body, without the token should the server repeat it."""
        text = answer.text.replace(self._token, "***") if self._token else answer.text
        return f"status {answer.status_code}: {' '.join(text.split())[:SHOWN]!r}"

    def _at(self, path: str) -> str:
        return f"{self.settings.url.rstrip('/')}{path}" if path else self.settings.url


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
