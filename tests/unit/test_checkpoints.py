"""Checkpoints: whole or absent, damaged ones passed over, found again by the same work alone."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from components import storage
from components.checkpoints import Checkpoints
from components.errors import InputError
from components.settings import Compute, Training
from components.sft.settings import SFTSettings
from threaded import in_threads


def saved(place: str | Path, *updates: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(place, every=1, keep=keep)
    for update in updates:
        checkpoints.save(update, {"weight": torch.full((2, 2), float(update))}, {"seen": [update, 0.1]})
    return checkpoints


def names(place: str | Path) -> list[str]:
    return storage.list_folders(str(place))


def alter(address: str, change: Callable[[bytes], bytes]) -> None:
    """Change a file of a checkpoint, wherever it lies."""
    folder, _, name = address.rpartition("/")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        shutil.copytree(storage.fetch(folder, into=Path(scratch)), copy)
        (copy / name).write_bytes(change((copy / name).read_bytes()))
        storage.put_folder(copy, folder)


def test_the_newest_checkpoint_comes_back_as_it_was(store: str) -> None:
    found = saved(f"{store}/c", 3, 12).latest()
    assert found is not None
    assert (found.update, found.source, found.values) == (12, f"{store}/c/00000012", {"seen": [12, 0.1]})
    assert torch.equal(found.tensors["weight"], torch.full((2, 2), 12.0))


@pytest.mark.parametrize(("keep", "kept"), [(2, ["00000003", "00000004"]), (1, ["00000004"])])
def test_only_the_newest_are_kept_and_no_temporary_folder_stays(keep: int, kept: list[str], store: str) -> None:
    saved(f"{store}/c", 1, 2, 3, 4, keep=keep)
    assert names(f"{store}/c") == kept


@pytest.mark.parametrize("name", ["tensors.safetensors", "values.json"])
@pytest.mark.parametrize(
    "change", [lambda content: content[:-4], lambda content: content.replace(b"2", b"3")], ids=["truncated", "altered"]
)
def test_a_damaged_newest_is_passed_over_with_a_warning(
    name: str, change: Callable[[bytes], bytes], store: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(f"{store}/c", 1, 2)
    alter(f"{store}/c/00000002/{name}", change)
    with caplog.at_level(logging.WARNING):
        found = checkpoints.latest()
    assert found is not None and found.update == 1
    assert f"{store}/c/00000002 is damaged ({name} not as written); using the one before it" in caplog.text


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null"])
def test_a_checkpoint_whose_digests_cannot_be_read_is_passed_over(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(tmp_path / "c", 1)
    alter(f"{tmp_path}/c/00000001/digests.json", lambda _: content)
    assert checkpoints.latest() is None
    assert "(digests.json is absent or not what was written); there is none before it" in caplog.text


@pytest.mark.parametrize("name", ["tensors.safetensors", "values.json", "digests.json"])
def test_a_checkpoint_with_a_missing_file_is_passed_over(name: str, store: str) -> None:
    checkpoints = saved(f"{store}/c", 1, 2)
    storage.remove(f"{store}/c/00000002/{name}")
    found = checkpoints.latest()
    assert found is not None and found.update == 1


def test_an_upload_that_was_killed_is_no_checkpoint(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from google.cloud.storage import Blob

    place, upload = bucket, Blob.upload_from_string
    saved(place, 1)

    def killed(blob: Blob, *content: object, **options: object) -> None:
        if blob.name.endswith("00000002/digests.json"):
            raise KeyboardInterrupt
        upload(blob, *content, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Blob, "upload_from_string", killed)
        with pytest.raises(KeyboardInterrupt):
            saved(place, 2)
    assert names(place) == ["00000001", "00000002"]  # the other files are there
    found = Checkpoints(place, 1).latest()
    assert found is not None and found.update == 1


def test_a_damaged_one_is_not_kept_in_place_of_a_whole_one(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path / "c", 2, 6, keep=1)
    alter(f"{tmp_path}/c/00000006/values.json", lambda _: b"")
    saved(tmp_path / "c", 2, keep=1)  # the run that found nothing whole starts over
    found = checkpoints.latest()
    assert found is not None and found.update == 2
    assert names(tmp_path / "c") == ["00000002"]


def test_a_checkpoint_of_other_work_that_was_copied_here_is_one_message(tmp_path: Path) -> None:
    there, here = (
        Checkpoints.of("sft", {"training": {"lr": lr}}, {}, tmp_path / str(lr) / "model", every=1) for lr in (0.1, 0.2)
    )
    there.save(1, {"weight": torch.zeros(1)}, {})
    shutil.copytree(there.place, here.place)
    message = "is a checkpoint of other work: settings.training.lr is 0.1 there and 0.2 here. Remove it to start over"
    with pytest.raises(InputError, match=f"^{here.place}/00000001 {message}"):
        here.latest()


def test_a_file_that_cannot_be_written_is_one_message_and_leaves_what_was_there(tmp_path: Path) -> None:
    """A limit on the size of files fails in the writers themselves, as a full disk does."""
    saved(tmp_path / "c", 1)
    code = f"""if True:
        import resource, torch
        from components.checkpoints import Checkpoints
        from components.errors import InputError
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        for tensors, values in (({{"w": torch.zeros(10**6)}}, {{}}), ({{}}, {{"history": "x" * 10**6}})):
            try:
                Checkpoints({str(tmp_path / "c")!r}, 1).save(2, tensors, values)
            except InputError as error:
                print(error)
        """
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert all("the checkpoint of update 2 cannot be written: " in line for line in lines)
    assert all("File too large" in line and "Make room or allow writing there" in line for line in lines)
    assert names(tmp_path / "c") == ["00000001"]
    found = Checkpoints(tmp_path / "c", 1).latest()
    assert found is not None and found.update == 1


def test_a_place_where_none_can_be_written_is_an_error_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLUMBLINE_CHECKPOINTS", str(tmp_path / "file" / "below"))
    message = f"below: checkpoints cannot be written there: {tmp_path / 'file'} is a file. .*PLUMBLINE_CHECKPOINTS"
    with pytest.raises(InputError, match=message):
        Checkpoints.of("sft", {}, {}, tmp_path / "model", every=1)
    monkeypatch.setenv("PLUMBLINE_CHECKPOINTS", str(tmp_path / "locked" / "below"))
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "locked")  # root may write anywhere
    with pytest.raises(InputError, match=r"locked is not writable"):
        Checkpoints.of("sft", {}, {}, tmp_path / "model", every=1)


def test_a_folder_that_cannot_be_removed_costs_a_warning_and_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(tmp_path / "c", 1)

    def refuse(address: str) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(storage, "remove", refuse)
    checkpoints.clear()
    assert f"{tmp_path / 'c'} cannot be removed: not yours" in caplog.text


def test_a_write_that_was_interrupted_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path / "c", 1)
    with monkeypatch.context() as patch:
        patch.setattr("components.checkpoints.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path / "c", 2)
    found = checkpoints.latest()
    assert found is not None and found.update == 1
    (tmp_path / "c" / ".00000002-killed").mkdir()  # what SIGKILL leaves
    saved(tmp_path / "c", 2)
    found = checkpoints.latest()
    assert found is not None and found.update == 2
    assert names(tmp_path / "c") == ["00000001", "00000002"]


def test_other_settings_inputs_or_steps_have_another_folder(tmp_path: Path) -> None:
    data, other_data = tmp_path / "data", tmp_path / "other"
    for folder, text in ((data, "a"), (other_data, "b")):
        folder.mkdir()
        (folder / "file").write_text(text)
    output = tmp_path / "model"

    def folder_of(step: str, lr: float, given: Path) -> Path:
        return Checkpoints.of(step, {"lr": lr}, {"data": given}, output, every=5).place

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
        folders.add(Checkpoints.of("base", {}, {"text": text}, tmp_path / "model", every=1).place)
    assert len(folders) == 2


def test_checkpoints_lie_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Checkpoints.of("sft", {}, {}, tmp_path / "run" / "model", every=1)
    assert Path(beside.place).parent == tmp_path / "run" / "checkpoints"
    monkeypatch.setenv("PLUMBLINE_CHECKPOINTS", str(tmp_path / "kept"))
    kept = Checkpoints.of("sft", {}, {}, tmp_path / "run" / "model", every=1)
    assert kept.place == str(tmp_path / "kept" / Path(beside.place).name)
    monkeypatch.setenv("PLUMBLINE_CHECKPOINTS", "gs://bucket/kept/")
    remote = Checkpoints.of("sft", {}, {}, tmp_path / "run" / "model", every=1)
    assert remote.place == f"gs://bucket/kept/{Path(beside.place).name}"


def test_with_every_zero_none_is_due_and_what_there_is_is_read(tmp_path: Path) -> None:
    saved(tmp_path / "c", 1)
    none = Checkpoints(tmp_path / "c", every=0)
    assert not any(none.due(update) for update in range(5))
    found = none.latest()
    assert found is not None and found.update == 1


def test_one_is_due_every_so_many_updates() -> None:
    checkpoints = Checkpoints("c", every=3)
    assert [update for update in range(1, 10) if checkpoints.due(update)] == [3, 6, 9]


def test_clearing_removes_them_all_and_nothing_beside_them(store: str) -> None:
    saved(f"{store}/c-2", 1)
    checkpoints = saved(f"{store}/c", 1, 2)
    checkpoints.clear()
    assert checkpoints.latest() is None and names(store) == ["c-2"]


def test_other_code_has_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = set()
    for fingerprint in ("one", "two", "one"):
        monkeypatch.setenv("PLUMBLINE_FINGERPRINT", fingerprint)
        folders.add(Checkpoints.of("rl", {}, {}, tmp_path / "model", 1).place)
    assert len(folders) == 2


def sft_place(folder: Path, accumulation: int = 1, **compute: Any) -> Checkpoints:
    training = Training(accumulation=accumulation, compute=Compute(**compute))
    settings = SFTSettings(training=training).model_dump(mode="json")
    return Checkpoints.of("sft", settings, {}, folder / "model", every=1)


def test_who_does_the_work_does_not_decide_where_its_checkpoints_are(tmp_path: Path) -> None:
    one = sft_place(tmp_path, 4)
    for other in (
        sft_place(tmp_path, 2, processes=2),
        sft_place(tmp_path, 1, processes=4, strategy="zero3", offload=True),
        sft_place(tmp_path, 1, processes=2, nodes=2),
    ):
        assert (other.place, other.work) == (one.place, one.work)
    assert sft_place(tmp_path, 4, dtype="fp32").place != one.place


def test_checkpoints_of_updates_of_another_size_are_refused_with_both_sizes(tmp_path: Path) -> None:
    sft_place(tmp_path, 1, processes=2).save(3, {"weight": torch.ones(1)}, {})
    assert sft_place(tmp_path, 2).latest() is not None
    with pytest.raises(InputError, match="other work: micro_batches_per_update is 2 there and 4 here"):
        sft_place(tmp_path, 2, processes=2).latest()


def test_processes_that_see_different_checkpoints_are_refused(tmp_path: Path) -> None:
    for rank in (0, 1):
        saved(tmp_path / str(rank), 3 + rank)
    same = in_threads(2, lambda ranks: Checkpoints(tmp_path / "1", 1).agreed(ranks))
    assert [checkpoint.update for checkpoint in same if checkpoint] == [4, 4]
    with pytest.raises(InputError, match=r"different checkpoints there, of the updates \[3, 4\].*such as a bucket"):
        in_threads(2, lambda ranks: Checkpoints(tmp_path / str(ranks.rank), 1).agreed(ranks))
    with pytest.raises(InputError, match=r"of the updates \[3, None\]"):
        in_threads(2, lambda ranks: Checkpoints(tmp_path / ("0" if ranks.rank == 0 else "none"), 1).agreed(ranks))


def test_the_first_process_writes_and_clears_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = saved(tmp_path / "c", 1)
    monkeypatch.setenv("RANK", "1")
    saved(tmp_path / "c", 2)
    kept.clear()
    assert names(tmp_path / "c") == ["00000001"]
