"""The cache is believed only while what upload and deploy did outside the run is still there."""

import shutil
from pathlib import Path

import pytest

from components.artifacts import write_json, write_manifest
from components.errors import InputError
from components.mlflow_run import MlflowRun
from components.serving.folder import publish
from pipeline.ledger import Ledger
from pipeline.promotion import anchored, stands
from pipeline.runs import RunFolder
from pipeline.settings import Settings
from pipeline.summary import Result, summarize


@pytest.fixture
def version(tmp_path: Path) -> tuple[Path, str]:
    folder = tmp_path / "registry" / "tiny" / "versions" / "v1"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("weights")
    digest = write_manifest(folder, "version")
    write_json(tmp_path / "registry" / "tiny" / "candidate.json", {"digest": digest})
    return folder, digest


def test_a_cached_upload_stands_while_its_version_is_in_the_registry(tmp_path: Path, version) -> None:
    folder, digest = version
    write_json(tmp_path / "upload/release/release.json", {"uri": str(folder), "digest": digest})
    assert stands("upload", tmp_path / "upload")
    shutil.rmtree(folder)
    assert not stands("upload", tmp_path / "upload")


def test_a_cached_upload_is_not_believed_when_a_file_was_altered_or_lost(tmp_path: Path, version) -> None:
    folder, digest = version
    write_json(tmp_path / "upload/release/release.json", {"uri": str(folder), "digest": digest})
    weights = folder / "model.safetensors"
    weights.write_text("altered")  # the manifest still states the digest
    assert not stands("upload", tmp_path / "upload")
    weights.write_text("weights")
    assert stands("upload", tmp_path / "upload")
    weights.unlink()
    assert not stands("upload", tmp_path / "upload")


@pytest.mark.parametrize("pointer", ['{"digest": "of another version"}', "{}", "[]", "no JSON", None])
def test_a_cached_upload_is_not_believed_when_it_is_not_the_candidate(
    tmp_path: Path, version, pointer: str | None
) -> None:
    folder, digest = version
    write_json(tmp_path / "upload/release/release.json", {"uri": str(folder), "digest": digest})
    path = tmp_path / "registry" / "tiny" / "candidate.json"
    path.unlink() if pointer is None else path.write_text(pointer)
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
    (served,) = serving.glob("versions/*/model.safetensors")
    served.write_text("altered")
    assert not stands("deploy", tmp_path / "deploy")
    served.write_text("weights")
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


def test_a_run_goes_on_without_its_own_database_after_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("the disk is odd")

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("pipeline.ledger.MlflowRun.create", refuse)
    warnings: list[str] = []
    ledger = Ledger(tmp_path, warnings.append)
    folder = RunFolder.create(tmp_path)
    ledger.open("demo", folder, {})
    ledger.cached(Result("sft", "cached"))
    ledger.close(folder, "succeeded")
    assert len(warnings) == 1
    assert "the disk is odd" in warnings[0]
    assert ledger.environment() == {"MLFLOW_TRACKING_URI": ""}  # a step would take it for a server that must answer
    assert ledger.place() is None


def test_what_mlflow_is_told_and_shown_of_its_address_has_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mlflow.org")
    monkeypatch.setattr("pipeline.ledger.START_S", 0.0)

    def refuse(*_: object) -> None:
        raise ConnectionError("no route to http://me:secret@mlflow.org/api")

    monkeypatch.setattr("pipeline.ledger.MlflowRun.create", refuse)
    ledger = Ledger(tmp_path, pytest.fail)
    with pytest.raises(InputError) as raised:
        ledger.open("demo", RunFolder.create(tmp_path), {})
    assert "no route to http://mlflow.org/api" in str(raised.value) and "secret" not in str(raised.value)
    ledger.run = MlflowRun(None, "r", "7")
    assert ledger.place() == "http://mlflow.org/#/experiments/7/runs/r"
    assert ledger.address == "http://me:secret@mlflow.org"  # what the steps connect with


def test_the_folders_of_upload_and_deploy_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    settings = anchored(Settings())
    assert settings.checkpoints is None
    assert anchored(Settings(checkpoints="kept")).checkpoints == str(Path.cwd() / "kept")
    assert anchored(Settings(checkpoints="gs://bucket/kept")).checkpoints == "gs://bucket/kept"
    assert settings.upload.registry == str(tmp_path / "models")
    assert settings.deploy.serving_dir == str(tmp_path / "serving")
    given = {"upload": {"registry": "gs://bucket/models"}, "deploy": {"serving_dir": "~/serving"}}
    settings = anchored(Settings.model_validate(given))
    assert settings.upload.registry == "gs://bucket/models"
    assert settings.deploy.serving_dir == "/home/somebody/serving"


@pytest.mark.parametrize(("applied", "served"), [(True, "d"), (False, None)])
def test_a_manifest_that_waits_to_be_applied_serves_nothing(tmp_path: Path, applied: bool, served: str | None) -> None:
    write_json(tmp_path / "deployment/deployment.json", {"target": "kserve", "digest": "d", "applied": applied})
    results = {"deploy": Result("deploy", "succeeded", folder=tmp_path)}
    assert summarize("r", "succeeded", 1.0, ("deploy",), results)["served_digest"] == served
