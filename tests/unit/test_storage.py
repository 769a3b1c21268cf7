"""The same verbs on local paths and on gs://, the latter against an emulator in this process."""

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.errors import InputError
from components.storage import fetch, fingerprint, get_text, is_remote, put_folder, put_text

BUCKET = "gs://feedback"


@pytest.fixture(scope="module")
def emulator() -> Iterator[str]:
    """The address of a running object-store emulator with one bucket."""
    from gcp_storage_emulator.server import create_server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="feedback")
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture(params=["local", "gs"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An address under which a test may write: a folder, or a folder of the bucket."""
    if request.param == "local":
        return str(tmp_path / "store")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("emulator"))
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "test")
    return f"{BUCKET}/{tmp_path.name}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file, and another one below."""
    made = tmp_path / "made"
    (made / "below").mkdir(parents=True)
    (made / "a.txt").write_text("one")
    (made / "below" / "b.bin").write_bytes(bytes(range(256)))
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_comes_back_as_it_was_put(root: str, folder: Path) -> None:
    put_folder(folder, f"{root}/model")
    assert contents(fetch(f"{root}/model")) == contents(folder)


def test_a_folder_with_a_like_name_is_not_fetched(root: str, folder: Path, tmp_path: Path) -> None:
    put_folder(folder, f"{root}/model")
    put_text("another", f"{root}/model-2/c.txt")
    put_text("a file", f"{root}/model.txt")
    before = fingerprint(f"{root}/model")
    put_text("changed", f"{root}/model-2/c.txt")
    assert contents(fetch(f"{root}/model", into=tmp_path / "into")) == contents(folder)
    assert fingerprint(f"{root}/model") == before


def test_one_file_is_fetched_as_a_file(root: str) -> None:
    put_text('{"prompt": "ü"}\n', f"{root}/data.jsonl")
    found = fetch(f"{root}/data.jsonl")
    assert found.name == "data.jsonl" and found.read_text(encoding="utf-8") == '{"prompt": "ü"}\n'


def test_text_is_replaced_and_absent_text_is_none(root: str) -> None:
    address = f"{root}/pointer.json"
    assert get_text(address) is None
    for text in ("first", "second"):
        put_text(text, address)
        assert get_text(address) == text


def test_the_fingerprint_changes_with_the_content(root: str, folder: Path) -> None:
    put_folder(folder, f"{root}/model")
    before = fingerprint(f"{root}/model")
    assert fingerprint(f"{root}/model") == before
    put_text("new", f"{root}/model/new.txt")
    assert fingerprint(f"{root}/model") != before


def test_nothing_there_is_an_error_that_names_the_address(root: str) -> None:
    for look in (fetch, fingerprint):
        with pytest.raises(InputError, match=f"{root}/absent: no "):
            look(f"{root}/absent")


def test_the_marker_of_a_folder_made_in_the_console_is_no_file(
    emulator: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator)
    from google.cloud import storage

    put_folder(folder, f"{BUCKET}/console/model")
    for marker in ("console/model/", "console/model/below/"):
        storage.Client().bucket("feedback").blob(marker).upload_from_string("")
    assert contents(fetch(f"{BUCKET}/console/model")) == contents(folder)
    assert contents(fetch(f"{BUCKET}/console/model/")) == contents(folder)


def test_a_local_address_is_itself_and_is_looked_for_beside_first(folder: Path) -> None:
    assert fetch(str(folder)) == folder
    assert fetch("a.txt", beside=folder) == folder / "a.txt"
    assert fetch(str(folder / "a.txt"), beside=folder / "below") == folder / "a.txt"
    with pytest.raises(InputError, match=r"c\.txt: no such file or folder \(looked in "):
        fetch("c.txt", beside=folder)


def test_a_local_folder_is_replaced_whole(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "store" / "model"
    put_folder(folder, str(target))
    (folder / "a.txt").unlink()
    put_folder(folder, str(target))
    assert contents(target) == contents(folder)
    assert [path.name for path in target.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("address", ["gs://", "gs://bucket", "gs://bucket/"])
def test_an_address_without_an_object_name_is_an_error(address: str) -> None:
    assert is_remote(address) and not is_remote("data/gs")
    with pytest.raises(InputError, match="accepted: gs://bucket/name"):
        fetch(address)
