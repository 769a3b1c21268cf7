"""How a Kubeflow Pipelines API is reached; what it refuses becomes one message that a person can act on."""

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp.client import Client
from kfp.client.token_credentials_base import TokenCredentialsBase, read_token_from_file
from kfp_server_api import ApiException
from urllib3.exceptions import HTTPError, MaxRetryError, SSLError

from components.errors import InputError

HOST, NAMESPACE, CA_CERT = "KF_PIPELINES_ENDPOINT", "PLUMBLINE_NAMESPACE", "PLUMBLINE_CA_CERT"
TOKEN, TOKEN_FILE = "PLUMBLINE_TOKEN", "PLUMBLINE_TOKEN_FILE"
"""The variables that the options --host, --namespace, --ca-cert and --token-file fall back to, and a token's own."""
PROBE_S = (10.0, 30.0)
"""Seconds to connect and to answer, for the first question; a host that drops packets would hold us for minutes."""
UNKNOWN = "unknown"
"""Any namespace keeps kfp's client from asking for one when it is made: five times, 5 s apart, with tracebacks."""
GIVE_TOKEN = f"Give a token: --token-file, or {TOKEN} in the environment."


class Unavailable(InputError):
    """The API cannot be reached now or fails by itself; who waits for a run asks again."""


@dataclass(frozen=True)
class Connection:
    """Where a Kubeflow Pipelines API is, and who asks."""

    host: str | None
    """The address of the API, or of Kubeflow's pages with their path: https://kubeflow.example.com/pipeline."""
    namespace: str | None = None
    """The namespace of runs where the installation has several users; also that of their pods."""
    token_file: Path | None = None
    """A file with a bearer token, read before every request, so that a token which is replaced there is followed."""
    ca_cert: Path | None = None
    """The certificates to trust in place of the usual ones: a PEM file."""

    def open(self) -> tuple[Client, bool]:
        """kfp's client, and whether the installation has several users.

        Raises InputError when the host is missing, wrong or no Kubeflow, or when it wants another token.
        """
        if not self.host:
            raise InputError(f"--host is missing: the address of Kubeflow Pipelines, also from {HOST}.")
        for option, path in (("--token-file", self.token_file), ("--ca-cert", self.ca_cert)):
            if path is not None and not path.is_file():
                raise InputError(f"{option} is {path}: no such file.")
        with warnings.catch_warnings(), self.asking():
            warnings.simplefilter("ignore")  # kfp tells of its age, and that https:// was put before a host
            client = Client(
                host=self.host,
                namespace=self.namespace or UNKNOWN,
                existing_token=None if self.token_file else os.environ.get(TOKEN),
                credentials=_FileToken(self.token_file) if self.token_file else None,
                ssl_ca_cert=self.ca_cert and str(self.ca_cert),
            )
            answer = client.healthzs.healthz_service_get_healthz(_preload_content=False, _request_timeout=PROBE_S)
            several = _several_users(answer.data)
        if several is None:
            raise InputError(
                f"{self.host} answers, but not as Kubeflow Pipelines does (no healthz at /apis/v2beta1). Check the "
                f"address and its path; a login page answers like this too. {GIVE_TOKEN}"
            )
        if several and not self.namespace:
            raise InputError(f"{self.host} has several users: name your namespace with --namespace or {NAMESPACE}.")
        return client, several

    @contextmanager
    def asking(self, missing: str = "") -> Iterator[None]:
        """Turns what the API refuses meanwhile into InputError; `missing` is the message where it finds nothing."""
        try:
            yield
        except ApiException as error:
            if error.status == 404 and missing:
                raise InputError(missing) from None
            raise self._refused(error) from None
        except (HTTPError, UnicodeDecodeError) as error:
            raise self._unreached(error) from None
        except OSError as error:  # of the token's file, or the certificates'
            raise InputError(f"{error.filename or self.ca_cert}: {error.strerror or error}.") from None

    def _refused(self, error: Any) -> InputError:
        """What an answer other than success means."""
        words = self._without_token(_words(error.body) or error.reason or "no reason given").rstrip(".")
        if error.status == 401:
            return InputError(f"{self.host} does not know who asks (401: {words}). {GIVE_TOKEN}")
        if error.status == 403:
            return InputError(
                f"{self.host} does not allow this (403: {words}). Check --namespace, or ask its administrator for the "
                "role kubeflow-edit there."
            )
        if error.status == 429 or error.status >= 500:
            return Unavailable(f"{self.host} failed ({error.status}: {words}). Try again later.")
        return InputError(f"{self.host} refuses ({error.status}: {words}).")

    def _unreached(self, error: Exception) -> InputError:
        """What it means that there was no answer."""
        reason = error.reason if isinstance(error, MaxRetryError) else error
        words = self._without_token(str(reason)).rsplit(": ", 1)[-1].rstrip(".")
        if isinstance(reason, SSLError):
            words = re.sub(r"^.*\] |\(_ssl.*$", "", str(reason)).strip()
            return InputError(
                f"{self.host}: no secure connection ({words}). Name its authority's certificates with --ca-cert (now "
                f"{self.ca_cert or 'the usual ones'}), or check whether the address begins with http:// or https://."
            )
        return Unavailable(f"{self.host} cannot be reached ({words}). Check the address, the network and the proxy.")

    def _without_token(self, text: str) -> str:
        """The text, without the token should a server repeat it."""
        token = self.token_file.read_text("utf-8").strip() if self.token_file else os.environ.get(TOKEN)
        return text.replace(token, "***") if token else text


class _FileToken(TokenCredentialsBase):  # type: ignore[misc]  # kfp has no types
    """Reads the token from its file before every request."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def refresh_api_key_hook(self, config: Any) -> None:
        config.api_key["authorization"] = read_token_from_file(str(self._path))


def _several_users(body: bytes) -> bool | None:
    """What healthz says of users; None when it is not Kubeflow's."""
    try:
        answer = json.loads(body)
    except ValueError:
        return None
    return bool(answer["multi_user"]) if isinstance(answer, dict) and "multi_user" in answer else None


def _words(body: Any) -> str:
    """The API's own words for an error; empty where it gives none."""
    try:
        answer = json.loads(body)
    except (TypeError, ValueError):
        return ""
    found = answer if isinstance(answer, dict) else {}
    return str(found.get("message") or found.get("error") or found.get("error_message") or "")
