"""A message to a webhook at the end of a run: a POST of JSON to the address in PLUMBLINE_WEBHOOK.

The address is a secret, for most of them hold a token in path or query: nothing that is said here names more than its
host, and neither an answer's body nor a library's message is repeated. A message that does not arrive is a warning.
"""

import logging
import os
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

import httpx

VARIABLE = "PLUMBLINE_WEBHOOK"
ATTEMPTS = 3
TIMEOUT_S = 10.0
BACKOFF_S = 1.0
"""Seconds before the second attempt; each further wait is twice the one before."""
FINAL = range(300, 500)
"""The answers that another attempt would not change."""


def send(message: Mapping[str, str]) -> str:
    """Post a message, where an address is set: empty when it arrived or nobody wants it, else what went wrong."""
    address = os.environ.get(VARIABLE, "").strip()
    if not address:
        return ""
    if not (host := _host(address)):
        return f"{VARIABLE} is no web address (not shown, it may hold a secret); accepted: https://server/path."
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs whole addresses, and Kubeflow shows what it logs
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(BACKOFF_S * 2 ** (attempt - 1))
        try:
            status = httpx.post(address, json=dict(message), timeout=TIMEOUT_S).status_code
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            reason = type(error).__name__
            continue
        if httpx.codes.is_success(status):
            return ""
        reason = f"status {status}"
        if status in FINAL and status != httpx.codes.TOO_MANY_REQUESTS:
            break
    return f"the webhook at {host} got no word of the run ({reason}); see to {VARIABLE} or to the server."


def _host(address: str) -> str:
    """The server of a web address; empty for what is none."""
    try:
        parts = urlsplit(address)
        return parts.hostname or "" if parts.scheme in ("http", "https") and parts.port != 0 else ""
    except ValueError:  # a port that is no number, half an IPv6 address
        return ""
