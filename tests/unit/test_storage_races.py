"""Several processes at one address: whoever writes replaces what it has read, and nothing else."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from components.storage import Overtaken, get_text, new_folder, put_folder, put_text, remove, update_text
from fault_proxy import FaultProxy, first_time
from object_store import ObjectStore

pytestmark = pytest.mark.tried(
    "pointers that several write",
    against="a stand-in for Cloud Storage that knows generations",
)


@pytest.fixture(params=["local", "gs"])
def pointer(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a text, in a folder or in a store that knows generations."""
    if request.param == "local":
        return str(tmp_path / "place" / "pointer.json")
    request.getfixturevalue("object_store")
    return "gs://bucket/place/pointer.json"


def test_a_text_is_replaced_only_as_it_was_read(pointer: str) -> None:
    absent = get_text(pointer)
    put_text("one", pointer, absent.generation)
    with pytest.raises(Overtaken, match=r"pointer\.json: another process wrote it meanwhile"):
        put_text("two", pointer, absent.generation)  # it must not be there, and it is
    first = get_text(pointer)
    assert first.content == "one"
    put_text("two", pointer, first.generation)
    with pytest.raises(Overtaken):
        put_text("three", pointer, first.generation)
    assert get_text(pointer).content == "two"
    put_text("one", pointer)  # whatever is there
    with pytest.raises(Overtaken):
        put_text("four", pointer, first.generation)  # the same content, and yet another generation


def test_changes_of_many_at_once_are_all_kept(pointer: str) -> None:
    def count() -> None:
        for _ in range(5):
            update_text(pointer, lambda text: str(int(text or 0) + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert get_text(pointer).content == "20"


def test_a_change_that_leaves_the_text_writes_nothing(pointer: str) -> None:
    update_text(pointer, lambda text: None)
    assert get_text(pointer).content is None
    put_text("one", pointer)
    before = get_text(pointer)
    update_text(pointer, lambda text: None)
    assert get_text(pointer) == before


def test_a_race_that_does_not_end_is_an_error(pointer: str) -> None:
    def meanwhile(text: str | None) -> str:
        put_text("theirs", pointer)
        return "ours"

    with pytest.raises(Overtaken):
        update_text(pointer, meanwhile)
    assert get_text(pointer).content == "theirs"


def test_a_write_whose_answer_was_lost_is_no_lost_race(
    object_store: ObjectStore, reach: Callable[[str], None], tmp_path: Path
) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a.txt").write_text("a")
    address = "gs://bucket/pointer.json"
    for action in (
        lambda: put_text("one", address, "0"),
        lambda: put_text("two", address, get_text(address).generation),
        lambda: put_folder(tmp_path / "made", "gs://bucket/model"),
        lambda: remove("gs://bucket/model"),
    ):
        proxy = FaultProxy(object_store.address, first_time("unanswered"))
        reach(proxy.address)
        action()
        proxy.close()
    assert {name: entry.content for name, entry in object_store.entries.items()} == {"pointer.json": b"two"}
    writes = [(method, name) for method, name, _ in object_store.asked if method != "GET"]
    assert writes == [
        *[("POST", "pointer.json")] * 4, *[("POST", "model/a.txt")] * 2, *[("DELETE", "model/a.txt")] * 2,
    ]  # fmt: skip


def test_a_text_that_is_replaced_between_its_two_requests_is_read_again(object_store: ObjectStore) -> None:
    object_store.write("pointer.json", b"one")

    def replace() -> None:  # first before the metadata are read, then before the content is
        object_store.meanwhile["GET", "pointer.json"] = lambda: object_store.write("pointer.json", b"two")

    object_store.meanwhile["GET", "pointer.json"] = replace
    read = get_text("gs://bucket/pointer.json")
    assert (read.content, read.generation) == ("two", str(object_store.entries["pointer.json"].generation))


@pytest.mark.parametrize("large", [False, True])
def test_an_object_that_another_process_wrote_since_it_was_listed_is_left_to_it(
    object_store: ObjectStore, tmp_path: Path, large: bool
) -> None:
    name = "version/model.safetensors"
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "model.safetensors").write_bytes(bytes((9 if large else 1) << 20))
    object_store.meanwhile["POST", name] = lambda: object_store.write(name, b"theirs")
    with pytest.raises(Overtaken, match=r"^gs://bucket/version/model\.safetensors: another process wrote it"):
        put_folder(tmp_path / "made", "gs://bucket/version")
    assert object_store.entries[name].content == b"theirs"
    put_folder(tmp_path / "made", "gs://bucket/version")  # now it was listed, and is replaced
    assert object_store.entries[name].size == (9 if large else 1) << 20


def test_an_object_that_another_process_wrote_with_the_same_content_is_as_good(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a.txt").write_text("same")
    object_store.meanwhile["POST", "version/a.txt"] = lambda: object_store.write("version/a.txt", b"same")
    put_folder(tmp_path / "made", "gs://bucket/version")
    assert object_store.entries["version/a.txt"].content == b"same"


def test_what_is_written_while_it_is_removed_stays(object_store: ObjectStore) -> None:
    object_store.write("model/a.txt", b"one")
    object_store.meanwhile["DELETE", "model/a.txt"] = lambda: object_store.write("model/a.txt", b"two")
    with pytest.raises(Overtaken):
        remove("gs://bucket/model")
    assert object_store.entries["model/a.txt"].content == b"two"
    object_store.meanwhile["DELETE", "model/a.txt"] = lambda: object_store.entries.pop("model/a.txt")
    remove("gs://bucket/model")  # gone already is gone


def test_a_new_folder_on_gs_never_shows_its_last_file_beside_what_is_not_its_own(object_store: ObjectStore) -> None:
    """At every request, a folder with digests.json is one of the two that were meant."""
    seen: list[set[str]] = []
    forget = object_store.forget_meanwhile

    def look(method: str, name: str) -> None:
        seen.append({f"{key}={entry.content.decode()}" for key, entry in object_store.entries.items()})
        forget(method, name)

    object_store.forget_meanwhile = look  # type: ignore[method-assign]
    for number, also in (("1", "b"), ("2", "c")):
        with new_folder("gs://bucket/c", last="digests.json") as folder:
            for name in ("a", also, "digests.json"):
                (folder / name).write_text(number)
    seen.append({f"{key}={entry.content.decode()}" for key, entry in object_store.entries.items()})
    whole = [state for state in seen if any(key.startswith("c/digests.json") for key in state)]
    one, two = ({f"c/{name}={n}" for name in ("a", also, "digests.json")} for n, also in (("1", "b"), ("2", "c")))
    assert len(whole) >= 2 and all(state in (one, two) for state in whole)
    assert seen[-1] == two
