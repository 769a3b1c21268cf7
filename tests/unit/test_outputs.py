"""A step started by hand writes over nothing that is not plumbline's own."""

from pathlib import Path

import pytest

from components.__main__ import main
from components.artifacts import write_manifest
from components.errors import InputError
from components.outputs import claimed


def write(step: str, folder: Path, **files: str) -> None:
    """What a step does: put files into the folder it is given."""
    with claimed(step, folder, "--out") as place:
        place.mkdir(exist_ok=True)
        for name, text in files.items():
            (place / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("step", ["base", "demo"])
def test_a_new_or_empty_folder_is_written(tmp_path: Path, step: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        write(step, tmp_path / name, a="one")
        assert contents(tmp_path / name) == {"a": "one"}


@pytest.mark.parametrize("step", ["base", "demo"])
def test_a_folder_with_files_of_a_person_is_left_alone(tmp_path: Path, step: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"^--out is .*mine, which holds files .*thesis\.txt\).*new or empty folder"):
        write(step, tmp_path / "mine", a="one")
    assert contents(tmp_path / "mine") == {"thesis.txt": "years of work"}
    with pytest.raises(InputError, match="which is a file"):
        write(step, tmp_path / "mine" / "thesis.txt", a="one")


def test_a_folder_that_plumbline_wrote_is_written_again_unless_more_was_put_there(tmp_path: Path) -> None:
    write("base", tmp_path / "model", weights="one")
    write_manifest(tmp_path / "model", "policy")
    write("base", tmp_path / "model", weights="two")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"\(notes\.txt\)"):
        write("base", tmp_path / "model", weights="three")


@pytest.mark.parametrize("manifest", ['{"name": "a web application"}', "[]", "no JSON", '{"schema_version": 1}'])
def test_a_manifest_of_another_program_is_none(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "index.html").write_text("<p>")
    with pytest.raises(InputError, match=r"index\.html"):
        write("base", tmp_path, weights="one")


def test_demo_data_is_written_over_the_same_data_only(tmp_path: Path) -> None:
    write("demo", tmp_path / "raw", prompts="q", corpus="c")
    write("demo", tmp_path / "raw", prompts="q", corpus="c")
    with pytest.raises(InputError, match=r"\(prompts\)"):
        write("demo", tmp_path / "raw", prompts="another", corpus="c")
    assert contents(tmp_path / "raw") == {"prompts": "q", "corpus": "c"}


def test_by_hand_the_output_is_left_alone_before_the_step_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "data").mkdir()
    assert main(["base", "--data", str(tmp_path / "data"), "--base", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --base is {tmp_path}, which holds files")
    assert (tmp_path / "mine.txt").read_text() == "mine"
