"""Deploying: the right files, an atomic switch with a way back, and KServe's manifest."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.artifacts import content_digest, read_json, verify_manifest, write_manifest
from components.cluster import annotated_digest
from components.deploy import kserve, step
from components.deploy.settings import DeploySettings, KServe
from components.errors import InputError
from components.release import Deployment, Release, version_of
from components.serving.folder import read_pointer, rollback
from components.storage import update_text


@pytest.fixture(autouse=True)
def without_cluster_and_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "no-kubeconfig"))


@pytest.fixture(autouse=True)
def without_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """No object store is asked: there is none behind the releases' gs:// addresses."""

    def update(address: str, change: Callable[[str | None], str | None]) -> None:
        if address.startswith("gs://"):
            raise InputError(f"{address}: no bucket")
        update_text(address, change)

    monkeypatch.setattr("components.champion.update_text", update)


@pytest.fixture
def settings(tmp_path: Path) -> DeploySettings:
    return DeploySettings(serving_dir=str(tmp_path / "serving"))


def released(tmp_path: Path, content: str) -> tuple[Path, Release]:
    """A published version that holds `content`, and the folder of its release."""
    version = tmp_path / "registry" / content
    version.mkdir(parents=True)
    (version / "model.safetensors").write_text(content)
    digest = write_manifest(version, "version")
    release = Release("tiny", version_of(digest), str(version), digest)
    release.write(tmp_path / f"release-{content}")
    return tmp_path / f"release-{content}", release


def test_a_release_is_placed_and_named_by_the_pointer(settings: DeploySettings, tmp_path: Path) -> None:
    folder, release = released(tmp_path, "one")
    assert step.run(settings, release=folder, deployment=tmp_path / "d") == {"deploy/applied": 1.0}
    pointer = read_pointer(tmp_path / "serving")
    assert (pointer.name, pointer.version, pointer.digest) == ("tiny", release.version, release.digest)
    assert pointer.previous is None and pointer.path == f"versions/{release.version}"
    assert content_digest(tmp_path / "serving" / pointer.path)[1] == release.digest
    assert Deployment.read(tmp_path / "d") == Deployment(
        "local", release.version, release.digest, serving_dir=str(tmp_path / "serving")
    )


def test_what_is_served_is_the_champion_of_its_registry(settings: DeploySettings, tmp_path: Path) -> None:
    for content in ("one", "two"):
        folder, release = released(tmp_path, content)
        step.run(settings, release=folder, deployment=tmp_path / "d")
        champion = read_json(tmp_path / "champion.json")
        assert champion == {"version": release.version, "digest": release.digest, "uri": release.uri}


def test_a_champion_that_cannot_be_named_is_served_all_the_same(
    settings: DeploySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(uri: str, digest: str) -> None:
        raise InputError(f"{uri}: read only")

    monkeypatch.setattr(step, "name_champion", refuse)
    folder, release = released(tmp_path, "one")
    assert step.run(settings, release=folder, deployment=tmp_path / "d") == {"deploy/applied": 1.0}
    assert read_pointer(tmp_path / "serving").digest == release.digest
    assert f"{release.uri}: read only" in caplog.text


def test_the_version_before_is_kept_for_a_rollback_and_older_ones_go(settings: DeploySettings, tmp_path: Path) -> None:
    versions = []
    for content in ("one", "two", "three"):
        folder, release = released(tmp_path, content)
        step.run(settings, release=folder, deployment=tmp_path / "d")
        versions.append(release.version)
    serving = tmp_path / "serving"
    assert {path.name for path in (serving / "versions").iterdir()} == set(versions[1:])
    back = rollback(str(serving))
    assert (back.version, back.previous) == (versions[1], versions[2])
    assert read_pointer(serving) == back
    assert verify_manifest(serving / back.path) == back.digest
    assert rollback(serving).version == versions[2]


def test_deploying_what_is_served_changes_nothing_and_keeps_the_way_back(
    settings: DeploySettings, tmp_path: Path
) -> None:
    one, first = released(tmp_path, "one")
    two, _ = released(tmp_path, "two")
    for folder in (one, two):
        step.run(settings, release=folder, deployment=tmp_path / "d")
    before = (tmp_path / "serving" / "current.json").read_bytes()
    step.run(settings, release=two, deployment=tmp_path / "d")
    assert (tmp_path / "serving" / "current.json").read_bytes() == before
    assert read_pointer(tmp_path / "serving").previous == first.version


def test_altered_or_exchanged_files_are_refused_and_the_old_version_stays(
    settings: DeploySettings, tmp_path: Path
) -> None:
    one, first = released(tmp_path, "one")
    step.run(settings, release=one, deployment=tmp_path / "d")
    two, second = released(tmp_path, "two")
    weights = Path(second.uri) / "model.safetensors"
    weights.write_text("altered")
    with pytest.raises(InputError, match=r"differs from its manifest in model\.safetensors"):
        step.run(settings, release=two, deployment=tmp_path / "d")
    exchanged = write_manifest(Path(second.uri), "version")
    with pytest.raises(InputError, match=f"{exchanged}; the release says {second.digest}"):
        step.run(settings, release=two, deployment=tmp_path / "d")
    assert read_pointer(tmp_path / "serving").digest == first.digest
    assert {path.name for path in (tmp_path / "serving" / "versions").iterdir()} == {first.version}


def test_a_damaged_copy_in_the_serving_folder_is_replaced(settings: DeploySettings, tmp_path: Path) -> None:
    folder, release = released(tmp_path, "one")
    step.run(settings, release=folder, deployment=tmp_path / "d")
    place = tmp_path / "serving" / "versions" / release.version
    (place / "model.safetensors").write_text("damaged")
    step.run(settings, release=folder, deployment=tmp_path / "d")
    assert verify_manifest(place) == release.digest


def test_a_rollback_without_a_version_before_says_so(settings: DeploySettings, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        rollback(tmp_path / "serving")
    folder, release = released(tmp_path, "one")
    step.run(settings, release=folder, deployment=tmp_path / "d")
    with pytest.raises(InputError, match=f"{release.version} is the first version deployed there"):
        rollback(tmp_path / "serving")


def remote_release(tmp_path: Path) -> Path:
    Release("tiny", "0123456789ab", "gs://bucket/tiny/versions/0123456789ab", "0123456789ab" * 5).write(
        tmp_path / "release"
    )
    return tmp_path / "release"


def test_without_a_cluster_the_manifest_is_only_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen = KServe(namespace="models", service="helper", gpus=2, service_account="reader", image="me/serve:1")
    settings = DeploySettings(target="kserve", kserve=chosen)
    metrics = step.run(settings, release=remote_release(tmp_path), deployment=tmp_path / "d")
    assert metrics == {"deploy/applied": 0.0} and "kubectl apply -f" in caplog.text
    deployment = Deployment.read(tmp_path / "d")
    assert deployment.service == "models/helper" and not deployment.applied
    manifest = yaml.safe_load((tmp_path / "d" / "inferenceservice.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert manifest["metadata"]["annotations"] == {"plumbline/digest": "0123456789ab" * 5}
    predictor = manifest["spec"]["predictor"]
    (container,) = predictor["containers"]
    assert container["env"] == [{"name": "STORAGE_URI", "value": "gs://bucket/tiny/versions/0123456789ab"}]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert predictor["serviceAccountName"] == "reader" and container["image"] == "me/serve:1"


def test_a_cluster_cannot_read_a_local_folder(tmp_path: Path) -> None:
    folder, _ = released(tmp_path, "one")
    with pytest.raises(InputError, match=r"set upload\.registry to a gs:// address"):
        step.run(DeploySettings(target="kserve"), release=folder, deployment=tmp_path / "d")


class Cluster(BaseHTTPRequestHandler):
    """As much of Kubernetes' interface as a deployment meets: objects, conflicts, and readiness after a while."""

    objects: dict[str, Any]
    seen: list[tuple[str, str | None]]
    refuse: int | None

    def do_POST(self) -> None:
        body = self.body()
        path = f"{self.path}/{body['metadata']['name']}"
        if self.refuse:
            self.reply(self.refuse, {"message": "not allowed"})
        elif path in self.objects:
            self.reply(409, {"message": "already exists"})
        else:
            self.objects[path] = body | {"metadata": body["metadata"] | {"generation": 1}}
            self.reply(201, body)

    def do_PATCH(self) -> None:
        found, body = self.objects[self.path], self.body()
        found["spec"] = body["spec"]
        found["metadata"] |= {**body["metadata"], "generation": found["metadata"]["generation"] + 1}
        self.reply(200, found)

    def do_GET(self) -> None:
        found = self.objects.get(self.path)
        if found is None:
            self.reply(404, {"message": "not found"})
            return
        self.reply(200, found)
        # ready in its newest form only for the next one who asks
        ready = {"type": "Ready", "status": "True"}
        found["status"] = {"observedGeneration": found["metadata"]["generation"], "conditions": [ready]}

    def body(self) -> Any:
        self.seen.append((self.command, self.headers["Content-Type"]))
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def reply(self, status: int, value: Any) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Cluster]]:
    handler = type("Handler", (Cluster,), {"objects": {}, "seen": [], "refuse": None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "test", "user": {}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(kserve, "POLL_S", 0.01)
    yield handler
    server.shutdown()
    server.server_close()


def test_a_cluster_gets_the_service_created_then_changed_and_is_waited_for(
    tmp_path: Path, cluster: type[Cluster]
) -> None:
    for image in ("me/serve:1", "me/serve:2"):
        settings = DeploySettings(target="kserve", kserve=KServe(image=image))
        metrics = step.run(settings, release=remote_release(tmp_path), deployment=tmp_path / "d")
        assert metrics == {"deploy/applied": 1.0}
    (found,) = cluster.objects.values()
    assert found["spec"]["predictor"]["containers"][0]["image"] == "me/serve:2"
    assert found["status"]["observedGeneration"] == found["metadata"]["generation"] == 2
    assert cluster.seen[-1] == ("PATCH", "application/merge-patch+json")
    assert read_json(tmp_path / "d" / "deployment.json")["service"] == "plumbline/tiny"


def test_a_refusal_of_the_cluster_names_its_reason_and_the_next_move(tmp_path: Path, cluster: type[Cluster]) -> None:
    cluster.refuse = 403
    with pytest.raises(InputError, match=r"403: not allowed.*Allow this account to create and patch"):
        step.run(DeploySettings(target="kserve"), release=remote_release(tmp_path), deployment=tmp_path / "d")


def test_a_service_that_does_not_get_ready_fails_the_step(tmp_path: Path, cluster: type[Cluster]) -> None:
    manifest = kserve.inference_service(KServe(), Release.read(remote_release(tmp_path)))
    with pytest.raises(RuntimeError, match="plumbline/tiny is not ready after 0 s: no condition reported"):
        kserve.apply(manifest, wait_s=1e-9)


def test_the_cluster_tells_which_digest_a_service_was_given(tmp_path: Path, cluster: type[Cluster]) -> None:
    step.run(DeploySettings(target="kserve"), release=remote_release(tmp_path), deployment=tmp_path / "d")
    assert annotated_digest("plumbline/tiny") == "0123456789ab" * 5
    with pytest.raises(InputError, match="no InferenceService plumbline/other"):
        annotated_digest("plumbline/other")


def test_without_a_cluster_no_service_tells_a_digest() -> None:
    assert annotated_digest("plumbline/tiny") is None
