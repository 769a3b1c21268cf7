"""How long an object store is waited for: what is tried again, how soon and for how long."""

import logging
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
CONNECT_S = 10.0
TRANSIENT_CODES = {408, 429, 500, 502, 503, 504}
"""The answers that Google's guide on retries names: docs/retry-strategy of Cloud Storage."""


class Stopped(Exception):
    """A part of a transfer that ends because another one failed."""


@dataclass(frozen=True)
class Patience:
    """Exponential back-off with full jitter: each wait is drawn between 0 and a bound that doubles.

    google.api_core.retry.Retry waits the same way, and the waits are drawn by its generator. It does not do the rest:
    it cannot be woken while it waits, sees no body that ends early and yet cleanly, sends a chunk of an upload again
    without asking how much of it arrived, and says nothing to whoever waits.
    """

    initial_s: float = 1.0
    """The bound of the first wait."""
    maximum_s: float = 32.0
    """The bound that no wait exceeds."""
    total_s: float = 300.0
    """For how long one request is tried again, in all."""
    silence_s: float = 60.0
    """After how long without a byte a connection is given up."""

    @property
    def timeout(self) -> tuple[float, float]:
        """Seconds to connect, and between two bytes."""
        return CONNECT_S, self.silence_s

    def insist(self, attempt: Callable[[], Result], what: str, stop: threading.Event | None = None) -> Result:
        """The result of the first attempt that succeeds; `what` is named in the log.

        Raises what an attempt raises when it is no failure of the moment or time is up, and Stopped after `stop`.
        """
        from google.api_core.retry import exponential_sleep_generator

        stop = stop or threading.Event()
        deadline = time.monotonic() + self.total_s
        for wait_s in exponential_sleep_generator(self.initial_s, self.maximum_s):
            if stop.is_set():
                break
            try:
                return attempt()
            except Exception as error:
                if not is_transient(error) or time.monotonic() + wait_s > deadline:
                    raise
                logger.warning("%s: %s; trying again in %.1f s", what, reason(error), wait_s)
            stop.wait(wait_s)
        raise Stopped


PATIENCE = Patience()
"""What every verb uses; tests put an impatient one here."""


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: the store is busy, or the network failed.

    A certificate that does not hold is none of these, though requests files it under connection errors.
    """
    import requests  # type: ignore[import-untyped]
    import urllib3
    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.exceptions import TransportError

    if isinstance(error, GoogleAPICallError):
        return error.code in TRANSIENT_CODES
    if isinstance(error, requests.exceptions.SSLError | ssl.SSLCertVerificationError):
        return "CERTIFICATE_VERIFY_FAILED" not in str(error)
    network = (
        ConnectionError, TimeoutError, TransportError,
        requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError,
        urllib3.exceptions.ProtocolError, urllib3.exceptions.TimeoutError,
    )  # fmt: skip
    return isinstance(error, network)


def reason(error: Exception) -> str:
    """What an error says, in one line without its full stop: the store's own words where it answered with some."""
    said = str(error)
    answer = getattr(error, "response", None)
    if answer is not None:
        with suppress(ValueError, KeyError, TypeError):  # no JSON, or of another form
            said = f"{answer.status_code} {answer.json()['error']['message']}"
    return (said.strip().splitlines() or [type(error).__name__])[0].rstrip(".")
