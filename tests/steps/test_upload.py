"""Publishing: only what passed, whole or not at all, once per digest, the pointer last."""

import json
import os
import shutil
from pathlib import Path

import pytest

from components.artifacts import (
    ModelCard,
    content_digest,
    read_json,
    verify_manifest,
    write_json,
    write_manifest,
)
from components.base.architecture import train_tokenizer, untrained_llama
from components.errors import InputError
from components.models import policy_card, save_model
from components.registry import promote, register
from components.storage import get_text, put_text
from components.upload import step
from components.upload.settings import UploadSettings
from object_store import ObjectStore


@pytest.fixture(autouse=True)
def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "PLUMBLINE_PARENT_RUN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(["the sky is blue"], 300)
    card = policy_card("the-base", "rl", tokenizer)
    folder = tmp_path / "model"
    llama = untrained_llama("1m", tokenizer, 64)
    save_model(llama, tokenizer, folder, card, settings={"rollouts": 7}, parents={})
    return folder


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return write_report(tmp_path / "report", passed=True)


@pytest.fixture
def settings(tmp_path: Path) -> UploadSettings:
    return UploadSettings(registry=str(tmp_path / "models"), name="tiny")


def write_report(folder: Path, passed: object) -> Path:
    metrics = {"eval/win_rate": 0.75, "gold": {"helpful": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}}}
    write_json(folder / "report.json", {"passed": passed, "metrics": metrics})
    write_manifest(folder, "report")
    return folder


def test_a_version_is_whole_and_the_pointer_and_the_release_name_its_digest(
    settings: UploadSettings, model: Path, report: Path, tmp_path: Path
) -> None:
    metrics = step.run(settings, model=model, report=report, release=tmp_path / "release")
    release = read_json(tmp_path / "release" / "release.json")
    place = tmp_path / "models" / "tiny" / "versions" / release["version"]
    assert release["name"] == "tiny" and release["uri"] == str(place) and release["model_version"] is None
    assert release["digest"] == verify_manifest(place) == content_digest(place)[1]
    assert release["digest"].startswith(release["version"]) and len(release["version"]) == 12
    pointer = read_json(tmp_path / "models" / "tiny" / "candidate.json")
    assert {name: pointer[name] for name in ("version", "digest", "uri")} == {
        name: release[name] for name in ("version", "digest", "uri")
    }
    added = {"README.md", "evaluation.json"}
    assert {path.name for path in model.iterdir()} | added == {path.name for path in place.iterdir()}
    assert not any(path.is_symlink() for path in place.rglob("*"))
    assert metrics["upload/new"] == 1.0


def test_the_card_tells_settings_metrics_digests_and_the_gate(
    settings: UploadSettings, model: Path, report: Path, tmp_path: Path
) -> None:
    step.run(settings, model=model, report=report, release=tmp_path / "release")
    place = Path(read_json(tmp_path / "release" / "release.json")["uri"])
    card = (place / "README.md").read_text("utf-8")
    assert "| eval/win_rate | 0.75 |" in card and "| gold/helpful | 0.5 (0.4 to 0.6) |" in card
    assert '"rollouts": 7' in card and "**passed**" in card
    assert verify_manifest(model) in card and verify_manifest(report) in card and "`the-base`" in card


def test_the_same_model_twice_changes_nothing(
    settings: UploadSettings, model: Path, report: Path, tmp_path: Path
) -> None:
    step.run(settings, model=model, report=report, release=tmp_path / "first")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "models").rglob("*") if path.is_file()}
    metrics = step.run(settings, model=model, report=report, release=tmp_path / "second")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "models").rglob("*") if path.is_file()}
    assert before == after and metrics["upload/new"] == 0.0
    first, second = (read_json(tmp_path / name / "release.json") for name in ("first", "second"))
    assert first == second


def test_the_digest_does_not_depend_on_where_the_model_lies(
    settings: UploadSettings, model: Path, report: Path, tmp_path: Path
) -> None:
    step.run(settings, model=model, report=report, release=tmp_path / "first")
    moved = shutil.move(model, tmp_path / "elsewhere")
    other = settings.model_copy(update={"registry": str(tmp_path / "other")})
    step.run(other, model=Path(moved), report=report, release=tmp_path / "second")
    first, second = (read_json(tmp_path / name / "release.json") for name in ("first", "second"))
    assert first["digest"] == second["digest"]


@pytest.mark.parametrize("passed", [False, None, "yes", 1])
def test_a_model_that_did_not_pass_is_not_published(
    settings: UploadSettings, model: Path, tmp_path: Path, passed: object
) -> None:
    report = write_report(tmp_path / "report", passed)
    with pytest.raises(InputError, match=r"report\.json: 'passed' is .*only a model whose evaluation passed"):
        step.run(settings, model=model, report=report, release=tmp_path / "release")
    assert not (tmp_path / "models").exists() and not (tmp_path / "release").exists()


def test_an_altered_model_is_not_published(settings: UploadSettings, model: Path, report: Path, tmp_path: Path) -> None:
    with (model / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"content differs from its manifest in model\.safetensors"):
        step.run(settings, model=model, report=report, release=tmp_path / "release")
    assert not (tmp_path / "models").exists()


def test_a_reward_model_is_not_published(settings: UploadSettings, model: Path, report: Path, tmp_path: Path) -> None:
    ModelCard("reward", "", "reward", "").write(model)
    write_manifest(model, "reward")
    with pytest.raises(InputError, match="a reward model; only a policy is published"):
        step.run(settings, model=model, report=report, release=tmp_path / "release")


@pytest.mark.parametrize("broken", ["put_folder", "register", "update_text"])
def test_a_failure_in_the_middle_leaves_the_old_pointer_and_the_next_try_succeeds(
    settings: UploadSettings,
    model: Path,
    report: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    step.run(settings, model=model, report=report, release=tmp_path / "release")
    pointer = tmp_path / "models" / "tiny" / "candidate.json"
    before = pointer.read_bytes()
    newer = write_report(tmp_path / "newer", passed=True)
    (newer / "more.txt").write_text("another evaluation")
    write_manifest(newer, "report")

    def fail(*arguments: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(step, broken, fail)
        with pytest.raises(OSError, match="full"):
            step.run(settings, model=model, report=newer, release=tmp_path / "again")
    assert pointer.read_bytes() == before and not (tmp_path / "again").exists()
    step.run(settings, model=model, report=newer, release=tmp_path / "again")
    assert read_json(pointer)["digest"] == read_json(tmp_path / "again" / "release.json")["digest"]
    assert pointer.read_bytes() != before


def test_a_damaged_version_is_published_anew(
    settings: UploadSettings, model: Path, report: Path, tmp_path: Path
) -> None:
    step.run(settings, model=model, report=report, release=tmp_path / "release")
    place = Path(read_json(tmp_path / "release" / "release.json")["uri"])
    (place / "model.safetensors").unlink()
    assert step.run(settings, model=model, report=report, release=tmp_path / "again")["upload/new"] == 1.0
    assert verify_manifest(place) == read_json(tmp_path / "again" / "release.json")["digest"]


def test_a_version_goes_to_object_storage_and_is_mended_unless_the_pointer_names_it(
    object_store: ObjectStore, model: Path, report: Path, tmp_path: Path
) -> None:
    settings = UploadSettings(registry="gs://bucket/models/", name="tiny")
    step.run(settings, model=model, report=report, release=tmp_path / "release")
    release = read_json(tmp_path / "release" / "release.json")
    assert release["uri"] == f"gs://bucket/models/tiny/versions/{release['version']}"
    address = "gs://bucket/models/tiny/candidate.json"
    assert json.loads(get_text(address).content or "")["digest"] == release["digest"]
    weights = f"models/tiny/versions/{release['version']}/model.safetensors"
    assert object_store.entries[weights].content == (model / "model.safetensors").read_bytes()
    assert step.run(settings, model=model, report=report, release=tmp_path / "a")["upload/new"] == 0.0
    put_text("{}", address)  # as if the upload had been interrupted before the pointer
    del object_store.entries[weights]
    object_store.asked.clear()
    assert step.run(settings, model=model, report=report, release=tmp_path / "b")["upload/new"] == 1.0
    written = [name for method, name, _ in object_store.asked if method == "POST"]
    assert written == [weights, "models/tiny/candidate.json"]


def test_of_two_uploads_at_once_both_versions_are_whole_and_the_later_one_is_the_candidate(
    object_store: ObjectStore, model: Path, report: Path, tmp_path: Path
) -> None:
    settings = UploadSettings(registry="gs://bucket/models", name="tiny")
    pointer = "models/tiny/candidate.json"
    object_store.meanwhile["POST", pointer] = lambda: object_store.write(pointer, b'{"digest": "of the other upload"}')
    step.run(settings, model=model, report=report, release=tmp_path / "release")
    release = read_json(tmp_path / "release" / "release.json")
    assert json.loads(object_store.entries[pointer].content)["digest"] == release["digest"]
    writes = [name for method, name, _ in object_store.asked if (method, name) == ("POST", pointer)]
    assert len(writes) == 2  # the first was refused: it would have replaced a pointer that was never read


def test_the_registry_has_one_version_per_digest_and_two_aliases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert register("tiny", str(tmp_path), "aaa") is None  # no address, no registry
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    first = register("tiny", str(tmp_path), "aaa")
    second = register("tiny", str(tmp_path), "bbb")
    assert (first, second) == ("1", "2")
    assert register("tiny", str(tmp_path), "bbb") == second
    assert promote("tiny", "aaa") == first and promote("tiny", "ccc") is None
    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    assert client.get_model_version_by_alias("tiny", "candidate").tags == {"digest": "bbb"}
    assert client.get_model_version_by_alias("tiny", "champion").tags == {"digest": "aaa"}


def test_a_registry_that_fails_costs_a_warning_without_its_password_and_the_model_is_published(
    settings: UploadSettings,
    model: Path,
    report: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:1")
    monkeypatch.setattr("components.registry.PATIENCE_S", 0.0)
    step.run(settings, model=model, report=report, release=tmp_path / "release")
    release = read_json(tmp_path / "release" / "release.json")
    assert release["model_version"] is None and verify_manifest(Path(release["uri"])) == release["digest"]
    assert promote("tiny", release["digest"]) is None
    warnings = [record.getMessage() for record in caplog.records if record.name == "components.registry"]
    assert [message.rsplit(": ", 1)[1] for message in warnings] == [
        "tiny is not registered in MLflow",
        "the champion alias of tiny is not set in MLflow",
    ]
    assert "secret" not in caplog.text


def test_a_version_is_readable_by_others(settings: UploadSettings, model: Path, report: Path, tmp_path: Path) -> None:
    step.run(settings, model=model, report=report, release=tmp_path / "release")
    place = Path(read_json(tmp_path / "release" / "release.json")["uri"])
    assert place.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in place.rglob("*") if path.is_file()} == {0o644}
