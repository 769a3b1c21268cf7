"""The same verbs on local paths and on gs://, the latter against an emulator in this process."""

from pathlib import Path

import pytest

from components.errors import InputError
from components.storage import (
    fetch,
    fingerprint,
    get_text,
    is_file,
    is_remote,
    list_folders,
    list_names,
    local_path,
    new_folder,
    patience,
    put_folder,
    put_text,
    remove,
)  # fmt: skip
from components.storage.patience import Patience
from object_store import ObjectStore


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


def test_a_folder_comes_back_as_it_was_put(store: str, folder: Path) -> None:
    put_folder(folder, f"{store}/model")
    assert contents(fetch(f"{store}/model")) == contents(folder)


def test_a_folder_with_a_like_name_is_not_fetched(store: str, folder: Path, tmp_path: Path) -> None:
    put_folder(folder, f"{store}/model")
    put_text("another", f"{store}/model-2/c.txt")
    put_text("a file", f"{store}/model.txt")
    before = fingerprint(f"{store}/model")
    put_text("changed", f"{store}/model-2/c.txt")
    assert contents(fetch(f"{store}/model", into=tmp_path / "into")) == contents(folder)
    assert fingerprint(f"{store}/model") == before


def test_one_file_is_fetched_as_a_file(store: str) -> None:
    put_text('{"prompt": "ü"}\n', f"{store}/data.jsonl")
    found = fetch(f"{store}/data.jsonl")
    assert found.name == "data.jsonl" and found.read_text(encoding="utf-8") == '{"prompt": "ü"}\n'


def test_text_is_replaced_and_absent_text_is_none(store: str) -> None:
    address = f"{store}/pointer.json"
    assert get_text(address).content is None
    for text in ("first", "second"):
        put_text(text, address)
        assert get_text(address).content == text


def test_the_fingerprint_changes_with_the_content(store: str, folder: Path) -> None:
    put_folder(folder, f"{store}/model")
    before = fingerprint(f"{store}/model")
    assert fingerprint(f"{store}/model") == before
    put_text("new", f"{store}/model/new.txt")
    assert fingerprint(f"{store}/model") != before


def test_the_folders_of_a_folder_are_listed_and_nothing_else(store: str, folder: Path) -> None:
    assert list_folders(f"{store}/models") == []
    for name in ("b", "a"):
        put_folder(folder, f"{store}/models/{name}")
    put_text("a file", f"{store}/models/c.txt")
    put_folder(folder, f"{store}/models-2/d")
    assert list_folders(f"{store}/models") == ["a", "b"]


def test_the_files_of_a_folder_are_listed_with_those_below_and_a_file_is_told_from_a_folder(
    store: str, folder: Path
) -> None:
    put_folder(folder, f"{store}/model")
    put_text("a file", f"{store}/model.txt")
    assert list_names(f"{store}/model") == ["a.txt", "below/b.bin"] and list_names(f"{store}/absent") == []
    assert [is_file(f"{store}/{name}") for name in ("model.txt", "model", "absent")] == [True, False, False]


def test_a_folder_that_is_put_again_loses_what_it_no_longer_holds(store: str, folder: Path) -> None:
    put_folder(folder, f"{store}/model")
    (folder / "below" / "b.bin").unlink()
    put_folder(folder, f"{store}/model")
    assert list_names(f"{store}/model") == ["a.txt"]


def test_what_is_removed_is_gone_and_its_like_stays(store: str, folder: Path) -> None:
    for name in ("model", "model-2"):
        put_folder(folder, f"{store}/{name}")
    put_text("a file", f"{store}/model.txt")
    for address in (f"{store}/model", f"{store}/model.txt", f"{store}/absent"):
        remove(address)
    assert list_folders(store) == ["model-2"] and get_text(f"{store}/model.txt").content is None


def test_a_new_folder_replaces_the_one_before_and_appears_when_it_is_whole(store: str, folder: Path) -> None:
    put_folder(folder, f"{store}/model")
    with new_folder(f"{store}/model") as made:
        (made / "c.txt").write_text("new")
        assert contents(fetch(f"{store}/model")) == contents(folder)
    assert contents(fetch(f"{store}/model")) == {"c.txt": b"new"}


def test_a_new_folder_that_fails_leaves_what_was_there_and_no_trace(store: str, folder: Path) -> None:
    put_folder(folder, f"{store}/model")

    def fail() -> None:
        with new_folder(f"{store}/model") as made:
            (made / "c.txt").write_text("new")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        fail()
    assert contents(fetch(f"{store}/model")) == contents(folder)
    assert list_folders(store) == ["model"]


def test_on_gs_the_last_file_goes_first_and_comes_last(object_store: ObjectStore, folder: Path) -> None:
    put_folder(folder, "gs://bucket/ordered", last="a.txt")
    (folder / "a.txt").write_text("two")
    (folder / "below" / "b.bin").rename(folder / "below" / "c.bin")
    put_folder(folder, "gs://bucket/ordered", last="a.txt")
    assert [(method, name) for method, name, _ in object_store.asked if method != "GET"] == [
        ("POST", "ordered/below/b.bin"),
        ("POST", "ordered/a.txt"),
        ("DELETE", "ordered/a.txt"),
        ("POST", "ordered/below/c.bin"),
        ("DELETE", "ordered/below/b.bin"),
        ("POST", "ordered/a.txt"),
    ]


def test_nothing_there_is_an_error_that_names_the_address(store: str) -> None:
    for look in (fetch, fingerprint):
        with pytest.raises(InputError, match=f"{store}/absent: no "):
            look(f"{store}/absent")


def test_the_marker_of_a_folder_made_in_the_console_is_no_file(object_store: ObjectStore, folder: Path) -> None:
    put_folder(folder, "gs://bucket/console/model")
    for marker in ("console/model/", "console/model/below/"):
        object_store.write(marker, b"")
    assert contents(fetch("gs://bucket/console/model")) == contents(folder)
    assert contents(fetch("gs://bucket/console/model/")) == contents(folder)


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


def test_a_tilde_is_the_home_directory_for_every_verb(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put_folder(folder, "~/store/model")
    put_text("text", "~/store/pointer.json")
    assert contents(fetch("~/store/model")) == contents(folder)
    assert fingerprint("~/store/model") == fingerprint(str(folder))
    assert get_text("~/store/pointer.json").content == "text" == (tmp_path / "store" / "pointer.json").read_text()
    with pytest.raises(InputError, match="no such user's home directory"):
        local_path("~there-is-no-such-user/model")


def test_what_is_put_may_be_read_by_others_though_the_source_is_private(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "a.txt", folder / "below" / "b.bin"):
        path.chmod(0o600)
    for path in (folder / "below", folder):
        path.chmod(0o700)
    put_folder(folder, str(tmp_path / "store" / "model"))
    target = tmp_path / "store" / "model"
    modes = {path.name: path.stat().st_mode & 0o777 for path in (target, *target.rglob("*"))}
    assert modes == {"model": 0o755, "below": 0o755, "a.txt": 0o644, "b.bin": 0o644}


def test_a_bucket_that_is_not_there_is_one_message(bucket: str) -> None:
    with pytest.raises(InputError, match=r"^gs://nowhere/model: .*Create the bucket or correct the address\.$"):
        put_text("text", "gs://nowhere/model")
    with pytest.raises(InputError, match=r"^gs://-/model: .*Correct the address\.$"):
        fetch("gs://-/model")


def refusals() -> list[tuple[Exception, str]]:
    from google.api_core.exceptions import Forbidden, RetryError
    from google.auth.exceptions import DefaultCredentialsError
    from requests.exceptions import ConnectionError as NoConnection

    return [
        (Forbidden("the account may not\nmore of it"), "403 the account may not. Allow this account"),
        (DefaultCredentialsError("Your default credentials were not found. See\nhere"), "Sign in with `gcloud"),
        (RetryError("Timeout of 120.0s exceeded", None), "Timeout of 120.0s exceeded.* Try again later"),
        (NoConnection("no route to host"), "no route to host.* Check the network"),
    ]


@pytest.mark.parametrize(("error", "message"), refusals())
def test_what_google_refuses_is_one_line_with_the_address_and_the_next_move(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from google.cloud import storage

    def refuse(*_: object, **__: object) -> None:
        raise error

    class Client:
        def close(self) -> None:
            pass

        def bucket(self, name: str) -> object:
            return type("Bucket", (), {"list_blobs": refuse, "get_blob": refuse, "name": name})()

    monkeypatch.setattr(storage, "Client", Client)
    monkeypatch.setattr(patience, "PATIENCE", Patience(initial_s=0.001, maximum_s=0.001, total_s=0.002))
    for look in (fetch, fingerprint, get_text):
        with pytest.raises(InputError, match=message) as caught:
            look("gs://bucket/model")
        assert str(caught.value).startswith("gs://bucket/model: ") and "\n" not in str(caught.value)


def test_missing_credentials_are_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nothing.json"))
    with pytest.raises(InputError, match=r"^gs://bucket/model: .*nothing\.json.*Sign in with"):
        fetch("gs://bucket/model")
