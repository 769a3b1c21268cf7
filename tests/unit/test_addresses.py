"""gs:// wherever a command or a step takes a path, and one clear message where it cannot be."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from components.__main__ import main
from components.base import step as base_step
from components.base.settings import BaseSettings
from components.errors import InputError
from components.outputs import CHECKPOINTS, claimed
from components.serving.app import serve
from components.serving.folder import rollback
from object_store import ObjectStore
from pipeline import cli
from pipeline.fingerprints import fingerprints
from pipeline.overrides import resolve

SMALL = {"num_corpus": 20, "num_demonstrations": 20, "num_pairs": 20, "num_prompts": 20, "num_test_prompts": 20}


def names(store: ObjectStore, prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in store.entries if name.startswith(prefix)}


def test_one_step_by_hand_reads_from_gs_and_writes_there(
    object_store: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    object_store.write("settings/demo.yaml", yaml.safe_dump(SMALL).encode())
    sources = {"preferences": "preferences.jsonl", "demonstrations": "demonstrations.json", "prompts": "prompts.jsonl"}
    object_store.write("settings/preprocess.yaml", yaml.safe_dump(sources).encode())
    assert main(["demo", "--settings", "gs://bucket/settings/demo.yaml", "--raw", "gs://bucket/raw"]) == 0
    assert set(sources.values()) <= names(object_store, "raw/")
    arguments = ["--settings", "gs://bucket/settings/preprocess.yaml", "--raw", "gs://bucket/raw"]
    capsys.readouterr()
    assert main(["preprocess", *arguments, "--data", "gs://bucket/data/"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads(object_store.entries["data.metrics/metrics.json"].content) == printed
    assert {"manifest.json", "preferences/train.parquet"} <= names(object_store, "data/")
    written = [name for method, name, _ in object_store.asked if method == "POST" and name.startswith("data/")]
    assert written[-1] == "data/manifest.json"  # where it is, the data are
    assert main(["preprocess", *arguments, "--data", "gs://bucket/data"]) == 0  # what is plumbline's is written again
    object_store.write("data/notes.txt", b"mine")
    assert main(["preprocess", *arguments, "--data", "gs://bucket/data"]) == 2
    message = "error: --data is gs://bucket/data, which holds files that would be lost (notes.txt)"
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)
    assert object_store.entries["data/notes.txt"].content == b"mine"


def test_by_hand_an_input_that_is_not_on_gs_is_one_message(
    object_store: ObjectStore, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["preprocess", "--raw", "gs://bucket/nothing", "--data", str(tmp_path / "data")]) == 2
    assert capsys.readouterr().err.startswith("error: --raw: gs://bucket/nothing: no object there. Check the bucket")


def test_the_demo_data_go_to_gs_and_over_the_same_data_only(object_store: ObjectStore) -> None:
    cli.demo("gs://bucket/raw", seed=4)
    first = {name: entry.content for name, entry in object_store.entries.items()}
    assert json.loads(first["raw/prompts.jsonl"].splitlines()[0])["prompt"]
    cli.demo("gs://bucket/raw", seed=4)
    with pytest.raises(InputError, match="--out is gs://bucket/raw, which holds files that would be lost"):
        cli.demo("gs://bucket/raw", seed=5)
    assert {name: entry.content for name, entry in object_store.entries.items()} == first


def test_a_file_on_gs_is_no_folder_to_write_to(object_store: ObjectStore) -> None:
    object_store.write("thesis.txt", b"years of work")
    with pytest.raises(InputError, match=r"--out is gs://bucket/thesis\.txt, which is a file"):
        cli.demo("gs://bucket/thesis.txt")
    assert object_store.entries["thesis.txt"].content == b"years of work"


def test_nothing_is_written_to_gs_by_a_step_that_fails(object_store: ObjectStore) -> None:
    def fail() -> None:
        with claimed("base", "gs://bucket/model", "--out") as place:
            place.mkdir()
            (place / "weights").write_text("half")
            raise InputError("no text")

    with pytest.raises(InputError, match="no text"):
        fail()
    assert object_store.entries == {}


def test_checkpoints_lie_beside_an_output_on_gs_too(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delenv(CHECKPOINTS, raising=False)
    with claimed("base", "gs://bucket/models/tiny/", "--out") as place:
        place.mkdir()
        assert os.environ[CHECKPOINTS] == "gs://bucket/models/checkpoints"
    assert CHECKPOINTS not in os.environ
    monkeypatch.setenv(CHECKPOINTS, "gs://elsewhere/kept")
    with claimed("base", "gs://bucket/models/tiny", "--out") as place:
        place.mkdir()
        assert os.environ[CHECKPOINTS] == "gs://elsewhere/kept"


def test_a_configuration_and_the_compiled_pipeline_may_lie_on_gs(object_store: ObjectStore) -> None:
    object_store.write("configs/mine.yaml", b"name: mine\nrl: {rollouts: 7}")
    settings = resolve(["demo", "gs://bucket/configs/mine.yaml"])
    assert (settings.name, settings.rl.rollouts) == ("mine", 7)
    object_store.write("configs/wrong.yaml", b"rl: {rolouts: 7}")
    with pytest.raises(InputError, match=r"in gs://bucket/configs/wrong\.yaml"):
        resolve(["gs://bucket/configs/wrong.yaml"])
    with pytest.raises(InputError, match=r"^gs://bucket/configs/none\.yaml: no object there"):
        resolve(["gs://bucket/configs/none.yaml"])
    cli.compile_(None, ["demo", "gs://bucket/configs/mine.yaml"], "gs://bucket/out/pipeline.yaml")
    assert b"# Name: mine" in object_store.entries["out/pipeline.yaml"].content


def test_text_for_a_base_model_and_its_fingerprint_come_from_gs(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    object_store.write("corpus.txt", b"one document\n\nanother")
    seen: list[object] = []
    monkeypatch.setattr(base_step, "_train", lambda settings, documents, inputs, base: seen.append(documents) or {})
    base_step.run(BaseSettings(text="gs://bucket/corpus.txt"), raw=None, data=tmp_path, base=tmp_path / "base")
    assert seen == [["one document", "another"]]
    settings = resolve(["demo"], ["base.text=gs://bucket/corpus.txt"])
    before = fingerprints(settings)
    object_store.write("corpus.txt", b"one document\n\nanother")
    after = fingerprints(settings)
    assert {task for task in before if before[task] != after[task]} == {"base"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (lambda: cli.run(["demo"], None, "gs://bucket/runs"), "--runs-dir is 'gs://bucket/runs'; accepted: a local"),
        (lambda: cli.rollback("serving", "gs://bucket/runs"), "--runs-dir is 'gs://bucket/runs'; accepted: a local"),
        (lambda: cli.serve("gs://bucket/serving"), "--dir is 'gs://bucket/serving'; accepted: a local folder, which a"),
        (lambda: serve("gs://bucket/serving"), "--dir is 'gs://bucket/serving'; accepted: a local folder, which a"),
        (lambda: rollback("gs://bucket/serving"), "--dir is 'gs://bucket/serving'; accepted: a local folder, which a"),
    ],
)
def test_where_only_a_local_folder_will_do_gs_is_one_message(
    command: Callable[[], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{message}"):
        command()
    assert list(tmp_path.iterdir()) == []
