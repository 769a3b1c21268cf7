"""The champion: written where it is served, read where a candidate must beat it, moved by a rollback."""

import json
from pathlib import Path

import pytest

from components.artifacts import read_manifest, write_manifest
from components.champion import Champion, evaluation_text, move_champion, name_champion, pointer_text, read_champion
from components.errors import InputError
from components.release import version_of
from components.storage import put_text
from pipeline.fingerprints import fingerprints
from pipeline.overrides import amend, resolve
from pipeline.promotion import anchored

OVER = "evaluate.thresholds={eval/reward: {min: 0.01, over: champion}}"


def published(place: str, digest: str, **metrics: float) -> str:
    """The address of a version with these numbers."""
    uri = f"{place}/versions/{version_of(digest)}"
    put_text(evaluation_text({"metrics": metrics}), f"{uri}/evaluation.json")
    return uri


def test_the_champion_is_the_version_named_last(store: str) -> None:
    place = f"{store}/models/tiny"
    assert read_champion(place) is None and pointer_text(place) is None
    for digest, reward in (("a" * 64, 0.5), ("b" * 64, 0.7)):
        name_champion(published(place, digest, reward=reward), digest)
        assert read_champion(place) == Champion(digest[:12], {"reward": reward})


def test_a_version_keeps_the_means_of_its_evaluation() -> None:
    report = {
        "metrics": {"eval/reward": 0.5, "eval/cost": None, "gold": {"mean": 0.25, "low": 0.2, "high": 0.3}},
        "categories": {"fact": {"eval/reward": {"mean": 0.75, "low": 0.7, "high": 0.8}, "eval/cost": {"mean": None}}},
    }
    assert json.loads(evaluation_text(report)) == {"eval/reward": 0.5, "gold": 0.25, "eval/reward/fact": 0.75}


@pytest.mark.parametrize("numbers", [None, "", "[]", '{"reward": "high"}'])
def test_a_champion_without_numbers_is_told(tmp_path: Path, numbers: str | None) -> None:
    digest = "c" * 64
    uri = published(str(tmp_path), digest)
    name_champion(uri, digest)
    if numbers is None:
        (Path(uri) / "evaluation.json").unlink()
    else:
        (Path(uri) / "evaluation.json").write_text(numbers)
    with pytest.raises(InputError, match=r"champion\.json: names a version whose evaluation\.json cannot be read"):
        read_champion(str(tmp_path))


def test_a_rollback_moves_the_champion_to_what_is_served(tmp_path: Path) -> None:
    place, served = tmp_path / "models" / "tiny", []
    for content in ("one", "two"):
        folder = tmp_path / "serving" / content
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(content)
        write_manifest(folder, "version", settings={"registry": str(tmp_path / "models"), "name": "tiny"})
        served.append(folder)
    assert move_champion(served[0]) is None  # nothing was named yet, in a registry of another place perhaps
    digests = [read_manifest(folder)["digest"] for folder in served]
    for digest, reward in zip(digests, (0.5, 0.7), strict=True):
        name_champion(published(str(place), digest, reward=reward), digest)
    assert move_champion(served[0]) == str(place)
    assert read_champion(str(place)) == Champion(digests[0][:12], {"reward": 0.5})
    plain = tmp_path / "plain"
    plain.mkdir()
    write_manifest(plain, "version")
    assert move_champion(plain) is None


def test_thresholds_over_the_champion_know_where_upload_publishes(tmp_path: Path) -> None:
    assert resolve([]).evaluate.champion is None
    settings = resolve([], [OVER, "upload.registry=gs://b/models/", "upload.name=chat"])
    assert settings.evaluate.champion == "gs://b/models/chat"
    assert resolve([], [OVER, "evaluate.champion=elsewhere/x"]).evaluate.champion == "elsewhere/x"
    assert Path(str(anchored(resolve([], [OVER])).evaluate.champion)) == Path.cwd() / "models" / "plumbline"
    before = resolve([]).model_dump(mode="json", exclude_none=True)
    assert amend(before, [OVER], "in a run")[0]["evaluate"]["champion"] == "models/plumbline"


def test_another_champion_makes_evaluate_run_again_and_nothing_else(tmp_path: Path) -> None:
    settings = anchored(resolve([], [OVER, f"upload.registry={tmp_path}"]))
    digest, prints = "d" * 64, []
    for _ in range(2):
        prints.append(fingerprints(settings))
        name_champion(published(str(tmp_path / "plumbline"), digest, reward=0.5), digest)
    before, after = prints
    assert {task for task in before if before[task] != after[task]} == {"evaluate"}
    assert fingerprints(settings) == after
