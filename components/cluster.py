"""The cluster that serves models through KServe: how to reach it, and which digest a service of it carries."""

import json
import logging
import os
from typing import Any

from components.errors import InputError

logger = logging.getLogger(__name__)

GROUP, VERSION, PLURAL = "serving.kserve.io", "v1beta1", "inferenceservices"
DIGEST_ANNOTATION = "plumbline/digest"
TIMEOUT_S = 30


def custom_objects() -> Any:
    """Kubernetes' interface for custom objects, inside a cluster or by kubeconfig; None without either."""
    from kubernetes import client, config

    try:
        config.load_incluster_config()
    except config.ConfigException:
        try:
            config.load_kube_config(config_file=os.environ.get("KUBECONFIG"))
        except config.ConfigException as error:
            logger.info("no cluster is configured (%s)", error)
            return None
    return client.CustomObjectsApi()


def reason_of(error: Any) -> str:
    """Why the cluster refused something, in its own words."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason)


def annotated_digest(service: str) -> str | None:
    """The digest that the InferenceService `namespace/name` carries.

    None without a cluster, or when it does not tell. Raises InputError when it has no such service.
    """
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    api = custom_objects()
    if api is None:
        return None
    namespace, _, name = service.partition("/")
    try:
        found = api.get_namespaced_custom_object(
            GROUP, VERSION, namespace, PLURAL, name, _request_timeout=TIMEOUT_S
        )
    except ApiException as error:
        if error.status == 404:
            raise InputError(f"the cluster has no InferenceService {service}. Deploy the release again.") from None
        logger.warning("the cluster does not show %s (%s %s)", service, error.status, reason_of(error))
        return None
    except HTTPError as error:
        logger.warning("the cluster cannot be asked about %s (%s)", service, error)
        return None
    digest = found["metadata"].get("annotations", {}).get(DIGEST_ANNOTATION)
    return None if digest is None else str(digest)
