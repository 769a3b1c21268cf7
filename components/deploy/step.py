"""Serving a release: in the folder that `plumbline serve` watches, or on a cluster through KServe."""

import logging
import tempfile
from pathlib import Path

from components.artifacts import Metrics, read_manifest, write_manifest
from components.champion import name_champion
from components.deploy.kserve import apply, inference_service, service_name
from components.deploy.settings import DeploySettings, KServe
from components.errors import InputError
from components.registry import promote
from components.release import Deployment, Release
from components.serving.folder import WATCHED, publish
from components.storage import fetch, is_remote, refuse_remote

logger = logging.getLogger(__name__)


def run(settings: DeploySettings, *, release: Path, deployment: Path) -> Metrics:
    """Serve the release; writes deployment.json (and for kserve the manifest) to `deployment`.

    Raises InputError when the published files are not those that were released; what was served stays served.
    """
    published = Release.read(release)
    deployment.mkdir(parents=True, exist_ok=True)
    if settings.target == "local":
        deployed = _locally(published, settings.serving_dir)
    else:
        deployed = _on_cluster(published, settings.kserve, deployment)
    deployed.write(deployment)
    if deployed.applied:
        promote(published.name, published.digest)
        _crown(published)
    parents = {"release": release}
    write_manifest(deployment, "deployment", settings=settings.model_dump(mode="json"), parents=parents)
    return {"deploy/applied": float(deployed.applied)}


def _crown(release: Release) -> None:
    """Name what is served now as the champion; it is served all the same where that cannot be written."""
    try:
        name_champion(release.uri, release.digest)
    except InputError as error:
        logger.warning("%s: thresholds over the champion are still over the one before", error)


def _locally(release: Release, serving_dir: str) -> Deployment:
    """Fetch the version, place it in the serving folder and switch to it."""
    folder = refuse_remote(serving_dir, "deploy.serving_dir", WATCHED).absolute()
    with tempfile.TemporaryDirectory(prefix="plumbline-") as scratch:
        source = fetch(release.uri, into=Path(scratch))
        _check(release, source)
        pointer = publish(source, release.name, folder)
    logger.info("deploy: %s serves %s (before: %s)", folder, pointer.version, pointer.previous)
    return Deployment("local", release.version, release.digest, serving_dir=str(folder))


def _on_cluster(release: Release, settings: KServe, deployment: Path) -> Deployment:
    """Write the InferenceService and apply it where a cluster is configured."""
    import yaml

    if not is_remote(release.uri):
        raise InputError(
            f"the release is at {release.uri}, which a cluster cannot read; "
            "set upload.registry to a gs:// address."
        )
    path = deployment / "inferenceservice.yaml"
    manifest = inference_service(settings, release)
    path.write_text(yaml.safe_dump(manifest, sort_keys=False), encoding="utf-8")
    applied = apply(manifest, settings.wait_s)
    if not applied:
        logger.warning("deploy: only written, no cluster is configured: kubectl apply -f %s", path)
    service = f"{settings.namespace}/{service_name(settings, release)}"
    return Deployment("kserve", release.version, release.digest, service=service, applied=applied)


def _check(release: Release, source: Path) -> None:
    """Raise InputError unless the published version is the one that was released."""
    if (found := read_manifest(source)["digest"]) != release.digest:
        raise InputError(
            f"{release.uri} has the digest {found}; the release says {release.digest}. "
            "The registry was changed after the upload: upload again."
        )
