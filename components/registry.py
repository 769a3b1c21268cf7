"""The MLflow model registry: a version for every published model, and aliases that say what it is for.

`candidate` is the version uploaded last, `champion` the one deployed last. A version is found again by its
digest, so registering the same model twice gives the same version. Without MLFLOW_TRACKING_URI there is no
registry. A registry that fails for half a minute costs a warning: what it is told about is published and served
without it.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

from components.errors import InputError
from components.mlflow_server import ADDRESS, address, client, persist, reason, without_password
from components.tracking import PARENT_RUN

logger = logging.getLogger(__name__)

PATIENCE_S = 30.0
CANDIDATE = "candidate"
CHAMPION = "champion"
DIGEST_TAG = "digest"


def register(name: str, uri: str, digest: str) -> str | None:
    """The registry's number for the version at `uri`, which is now the candidate.

    None without a registry, or when it fails. Raises InputError when it does not accept the address.
    """

    def write(client: Any) -> str:
        _ensure_model(client, name)
        number = _number(client, name, digest) or _create(client, name, uri, digest)
        client.set_registered_model_alias(name, CANDIDATE, number)
        logger.info("MLflow registry: %s version %s is the %s", name, number, CANDIDATE)
        return number

    return _attempt(write, f"{name} is not registered")


def promote(name: str, digest: str) -> str | None:
    """The registry's number for the version with this digest, which is now the champion.

    None without a registry, when it fails, or when the version was published without one.
    """

    def write(client: Any) -> str | None:
        number = _number(client, name, digest)
        if number is None:
            logger.info("MLflow registry: no version of %s has the digest %s", name, digest)
            return None
        client.set_registered_model_alias(name, CHAMPION, number)
        logger.info("MLflow registry: %s version %s is the %s", name, number, CHAMPION)
        return number

    return _attempt(write, f"the {CHAMPION} alias of {name} is not set")


def _attempt(action: Callable[[Any], str | None], consequence: str) -> str | None:
    """What the action gives, or None and a line in the log: no address is set, or MLflow failed.

    Raises InputError when the action does.
    """
    if not os.environ.get(ADDRESS):
        logger.info("%s is unset: %s in MLflow", ADDRESS, consequence)
        return None
    try:
        return persist(lambda: action(client()), PATIENCE_S)
    except InputError:
        raise
    except Exception as error:  # what was published must be served all the same
        logger.warning("MLflow at %s failed (%s): %s in MLflow", address(), reason(error), consequence)
        return None


def _ensure_model(client: Any, name: str) -> None:
    """Create the registered model when there is none of that name."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _number(client: Any, name: str, digest: str) -> str | None:
    """The number of the version with this digest, or None."""
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get(DIGEST_TAG) == digest:
            return str(version.version)
    return None


def _create(client: Any, name: str, uri: str, digest: str) -> str:
    """A new version, linked with the run that made it: Kubeflow's, else the local pipeline's."""
    from mlflow.exceptions import MlflowException

    run_id = os.environ.get("MLFLOW_RUN_ID") or os.environ.get(PARENT_RUN)
    try:
        created = client.create_model_version(name, source=uri, run_id=run_id, tags={DIGEST_TAG: digest})
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise InputError(
            f"the MLflow registry at {address()} does not accept {uri} as a model's "
            f"source: {without_password(error.message)} Set upload.registry to a gs:// address that the server can "
            "read."
        ) from None
    return str(created.version)
