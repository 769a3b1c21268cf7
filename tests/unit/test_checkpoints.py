"""Checkpoints: whole or absent, damaged ones passed over, found again by the same work alone."""

import logging
from pathlib import Path

import pytest
import torch

from components.checkpoints import Checkpoints


def saved(folder: Path, *updates: int) -> Checkpoints:
    checkpoints = Checkpoints(folder, every=1)
    for update in updates:
        checkpoints.save(update, {"weight": torch.full((2, 2), float(update))}, {"seen": [update, 0.1]})
    return checkpoints


def test_the_newest_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    found = saved(tmp_path / "c", 3, 12).latest()
    assert found is not None
    assert found.update == 12 and found.values == {"seen": [12, 0.1]}
    assert torch.equal(found.tensors["weight"], torch.full((2, 2), 12.0))


def test_only_the_last_two_are_kept_and_no_temporary_folder_stays(tmp_path: Path) -> None:
    saved(tmp_path / "c", 1, 2, 3, 4)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["00000003", "00000004"]


def test_a_truncated_newest_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(tmp_path / "c", 1, 2)
    tensors = tmp_path / "c" / "00000002" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4])
    with caplog.at_level(logging.WARNING):
        found = checkpoints.latest()
    assert found is not None and found.update == 1
    assert "00000002 is damaged" in caplog.text


@pytest.mark.parametrize("name", ["tensors.safetensors", "values.json"])
def test_a_checkpoint_with_a_missing_file_is_passed_over(tmp_path: Path, name: str) -> None:
    checkpoints = saved(tmp_path / "c", 1, 2)
    (tmp_path / "c" / "00000002" / name).unlink()
    found = checkpoints.latest()
    assert found is not None and found.update == 1


def test_a_write_that_was_interrupted_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path / "c", 1)
    with monkeypatch.context() as patch:
        patch.setattr(
            "components.checkpoints.write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
        )
        with pytest.raises(OSError, match="disk full"):
            saved(tmp_path / "c", 2)
    found = checkpoints.latest()
    assert found is not None and found.update == 1
    saved(tmp_path / "c", 2)  # what the interrupted write left is in nobody's way
    found = checkpoints.latest()
    assert found is not None and found.update == 2


def test_other_settings_inputs_or_steps_have_another_folder(tmp_path: Path) -> None:
    data, other_data = tmp_path / "data", tmp_path / "other"
    for folder, text in ((data, "a"), (other_data, "b")):
        folder.mkdir()
        (folder / "file").write_text(text)
    output = tmp_path / "model"

    def folder_of(step: str, lr: float, given: Path) -> Path:
        return Checkpoints.of(step, {"lr": lr}, {"data": given}, output, every=5).folder

    assert folder_of("sft", 0.1, data) == folder_of("sft", 0.1, data)
    folders = {
        folder_of(*key)
        for key in (("sft", 0.1, data), ("sft", 0.2, data), ("rl", 0.1, data), ("sft", 0.1, other_data))
    }
    assert len(folders) == 4


def test_an_input_that_is_a_file_counts_by_its_content(tmp_path: Path) -> None:
    text, folders = tmp_path / "text.txt", set()
    for content in ("one", "two"):
        text.write_text(content)
        folders.add(Checkpoints.of("base", {}, {"text": text}, tmp_path / "model", every=1).folder)
    assert len(folders) == 2


def test_checkpoints_lie_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Checkpoints.of("sft", {}, {}, tmp_path / "run" / "model", every=1)
    assert beside.folder.parent == tmp_path / "run" / "checkpoints"
    monkeypatch.setenv("PLUMBLINE_CHECKPOINTS", str(tmp_path / "kept"))
    kept = Checkpoints.of("sft", {}, {}, tmp_path / "run" / "model", every=1)
    assert kept.folder == tmp_path / "kept" / beside.folder.name


def test_with_every_zero_none_is_due_and_what_there_is_is_read(tmp_path: Path) -> None:
    saved(tmp_path / "c", 1)
    none = Checkpoints(tmp_path / "c", every=0)
    assert not any(none.due(update) for update in range(5))
    found = none.latest()
    assert found is not None and found.update == 1


def test_one_is_due_every_so_many_updates_and_clearing_removes_them_all(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", every=3)
    assert [update for update in range(1, 10) if checkpoints.due(update)] == [3, 6, 9]
    saved(tmp_path / "c", 1, 2)
    checkpoints.clear()
    assert checkpoints.latest() is None and not (tmp_path / "c").exists()


def test_other_code_has_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = set()
    for fingerprint in ("one", "two", "one"):
        monkeypatch.setenv("PLUMBLINE_FINGERPRINT", fingerprint)
        folders.add(Checkpoints.of("rl", {}, {}, tmp_path / "model", 1).folder)
    assert len(folders) == 2
