"""The MLflow model registry: a version for every published model, and aliases that say what it is for.

`candidate` is the version uploaded last, `champion` the one deployed last. A version is found again by its
digest, so registering the same model twice gives the same version. Without MLFLOW_TRACKING_URI there is no
registry.
"""

import logging
import os
from typing import Any

from components.errors import InputError
from components.tracking import PARENT_RUN

logger = logging.getLogger(__name__)

ADDRESS = "MLFLOW_TRACKING_URI"
CANDIDATE = "candidate"
CHAMPION = "champion"
DIGEST_TAG = "digest"


def register(name: str, uri: str, digest: str) -> str | None:
    """The registry's number for the version at `uri`, which is now the candidate; None without a registry.

    Raises InputError when the registry does not accept the address.
    """
    client = _client(f"{name} is not registered")
    if client is None:
        return None
    _ensure_model(client, name)
    number = _number(client, name, digest)
    if number is None:
        number = _create(client, name, uri, digest)
    client.set_registered_model_alias(name, CANDIDATE, number)
    logger.info("MLflow registry: %s version %s is the %s", name, number, CANDIDATE)
    return number


def promote(name: str, digest: str) -> str | None:
    """The registry's number for the version with this digest, which is now the champion.

    None without a registry, or when the version was published without one.
    """
    client = _client(f"the {CHAMPION} alias of {name} is not set")
    number = client and _number(client, name, digest)
    if client is None or number is None:
        return None
    client.set_registered_model_alias(name, CHAMPION, number)
    logger.info("MLflow registry: %s version %s is the %s", name, number, CHAMPION)
    return str(number)


def _client(consequence: str) -> Any:
    """MLflow's client, or None and a line in the log when no address is set."""
    if not os.environ.get(ADDRESS):
        logger.info("%s is unset: %s in MLflow", ADDRESS, consequence)
        return None
    import mlflow

    return mlflow.MlflowClient()


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
            f"the MLflow registry at {os.environ[ADDRESS]} does not accept {uri} as a model's source: "
            f"{error.message} Set upload.registry to a gs:// address that the server can read."
        ) from None
    return str(created.version)
