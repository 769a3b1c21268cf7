"""The MLflow server: how long it is waited for, and what is said when it does not answer.

By default MLflow spends minutes on a request that fails. Here one gets half a minute and one go; going again is
up to `persist` and to the outbox, for what may be said twice. MLFLOW_HTTP_REQUEST_TIMEOUT and
MLFLOW_HTTP_REQUEST_MAX_RETRIES still set it otherwise.

A server that a person named must answer when a run starts: with a mistyped address a night's metrics would be lost, so
that is an error. With PLUMBLINE_MLFLOW=optional it is a warning.
"""

import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from components.errors import InputError

ADDRESS = "MLFLOW_TRACKING_URI"
NEED = "PLUMBLINE_MLFLOW"
START_S = 20.0
"""How long a server that is not there is asked again at the start, as it may be starting too."""
DEFAULTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
PASSING = frozenset({408, 429, 499})
"""Answers below 500 that may be others a moment later: time-out, too many requests, cancelled."""
CURABLE = PASSING | {401, 403, 404, 409}
"""Answers below 500 that somebody may change from outside: a password, a permission, a run that was deleted."""

T = TypeVar("T")


def client() -> Any:
    """MLflow's client for the address in the environment."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it would be printed with user and password
    import mlflow

    for chatty in ("alembic", "mlflow.store.db.utils"):  # a line per migration of a new database
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return mlflow.MlflowClient()


def persist(action: Callable[[], T], within_s: float) -> T:
    """What the action gives; it is done again for so many seconds while the server does not answer.

    Raises what the action raised last, at once where going again would change nothing.
    """
    until, pause = time.monotonic() + within_s, 0.5
    while True:
        try:
            return action()
        except Exception as error:
            if not passing(error) or time.monotonic() + pause > until:
                raise
        time.sleep(pause)
        pause *= 2


def passing(error: BaseException) -> bool:
    """Whether the same request may work a moment later: no connection, no answer, a server in trouble."""
    status = _status(error)
    if status is None:
        return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    return status >= 500 or status in PASSING


def refused(error: BaseException) -> bool:
    """Whether going again would never help: the request is wrong, the file to send is gone, no key to where it goes."""
    return not passing(error) and _status(error) not in CURABLE


def reason(error: BaseException) -> str:
    """What went wrong at the bottom, such as a refused connection, without passwords.

    MLflow, requests and urllib3 wrap it in turn, some as the cause, some as the context and some as an argument.
    """
    inner: BaseException | None = error
    while inner is not None:
        error, wrapped = inner, (arg for arg in inner.args if isinstance(arg, BaseException))
        inner = next(wrapped, None) or inner.__cause__ or inner.__context__
    return without_password(error) or type(error).__name__


def address() -> str:
    """The server's address, to show."""
    return without_password(os.environ[ADDRESS])


def without_password(shown: object) -> str:
    """A text to show, such as an address or an error: no address in it names a user or a password.

    A password may hold any character but white space, so everything up to the last @ goes.
    """
    return re.sub(r"://(?:[^\s/:@]*:\S*|[^\s/]*)@", "://", str(shown))


def is_required() -> bool:
    """Whether a run may not start without the server that is named. Raises InputError for another word than ours."""
    need = os.environ.get(NEED, "required")
    if need not in ("required", "optional"):
        raise InputError(f"{NEED} is {need!r}; accepted: required (the default), optional.")
    return need == "required"


def failure(error: BaseException, otherwise: str = "") -> InputError:
    """What to raise when MLflow must take something and does not; `otherwise` is one more way out."""
    return InputError(
        f"{ADDRESS} is {address()}, and MLflow there failed ({reason(error)}). Correct it or what goes with it "
        f"(MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD), or start the server.{otherwise}"
    )


def failure_at_start(error: BaseException) -> InputError:
    """What to raise when no run can be started on a server that must answer."""
    return failure(error, f" To go on without tracking there, unset {ADDRESS} or set {NEED}=optional.")


def _status(error: BaseException) -> int | None:
    """The HTTP status of MLflow's answer, or the one that its own exceptions stand for; None for any other error."""
    stated = getattr(error, "get_http_status_code", None)
    if stated is not None:
        return int(stated())
    answer = getattr(getattr(error, "response", None), "status_code", None)
    return None if answer is None else int(answer)
