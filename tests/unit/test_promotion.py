"""The cache is believed only while what upload and deploy did outside the run is still there."""

import shutil
from pathlib import Path

import pytest

from components.artifacts import write_json, write_manifest
from components.serving.folder import publish
from pipeline.ledger import Ledger
from pipeline.promotion import stands
from pipeline.runs import RunFolder
from pipeline.summary import Result


@pytest.fixture
def version(tmp_path: Path) -> tuple[Path, str]:
    folder = tmp_path / "registry" / "v1"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("weights")
    return folder, write_manifest(folder, "version")


def test_a_cached_upload_stands_while_its_version_is_in_the_registry(tmp_path: Path, version) -> None:
    folder, digest = version
    write_json(tmp_path / "upload/release/release.json", {"uri": str(folder), "digest": digest})
    assert stands("upload", tmp_path / "upload")
    shutil.rmtree(folder)
    assert not stands("upload", tmp_path / "upload")


def test_a_cached_deployment_stands_while_its_version_is_the_one_served(tmp_path: Path, version) -> None:
    folder, digest = version
    serving = tmp_path / "serving"
    write_json(
        tmp_path / "deploy/deployment/deployment.json",
        {"target": "local", "serving_dir": str(serving), "digest": digest},
    )
    assert not stands("deploy", tmp_path / "deploy")
    publish(folder, "plumbline", serving)
    assert stands("deploy", tmp_path / "deploy")
    (folder / "model.safetensors").write_text("other weights")
    write_manifest(folder, "version")
    publish(folder, "plumbline", serving)
    assert not stands("deploy", tmp_path / "deploy")


def test_what_lies_in_buckets_and_clusters_is_not_asked(tmp_path: Path) -> None:
    write_json(tmp_path / "release/release.json", {"uri": "gs://bucket/models/v1", "digest": "d"})
    write_json(tmp_path / "deployment/deployment.json", {"target": "kserve", "digest": "d"})
    assert stands("upload", tmp_path)
    assert stands("deploy", tmp_path)
    assert stands("sft", tmp_path)


def test_a_run_goes_on_without_mlflow_after_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("pipeline.ledger.MlflowRun.create", refuse)
    warnings: list[str] = []
    ledger = Ledger(tmp_path, warnings.append)
    folder = RunFolder.create(tmp_path)
    ledger.open("demo", folder, {})
    ledger.cached(Result("sft", "cached"))
    ledger.close(folder, "succeeded")
    assert len(warnings) == 1
    assert "no route to host" in warnings[0]
    assert ledger.environment() == {}
    assert ledger.place() is None
