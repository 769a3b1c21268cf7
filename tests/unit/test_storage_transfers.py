"""Transfers to and from an object store that fails in every way a network can: nothing lost, nothing half-published."""

import gzip
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from components.errors import InputError
from components.storage import download, fetch, get_text, list_names, parallel, patience, put_folder, session, upload
from components.storage.checksum import bytes_crc32c, file_crc32c
from components.storage.parallel import in_parallel
from components.storage.patience import Patience, Stopped, is_transient
from fault_proxy import FAULTS, FaultProxy, Plan, first_time, seeded
from object_store import ObjectStore

pytestmark = pytest.mark.tried(
    "transfers: drops, 503s, truncation, slow reads, damage",
    against="gcp-storage-emulator behind a fault-injecting proxy, and a stand-in for Cloud Storage",
)

BLOCK = 256 << 10
EMULATED = [fault for fault in FAULTS if fault not in ("half sent", "damaged")]
"""The emulator takes half a body for a whole one; damage has a test of its own, for it is not outlasted by patience."""


@pytest.fixture
def content() -> dict[str, bytes]:
    """The files of a folder: one of several pieces, one of exactly one, small ones, an empty one."""
    chance = random.Random(3)
    sizes = {"weights.bin": 4 * BLOCK + 1000, "one.bin": BLOCK, "below/deep/a.json": 5000, "b.txt": 1, "empty": 0}
    return {name: chance.randbytes(size) for name, size in sizes.items()}


@pytest.fixture
def folder(tmp_path: Path, content: dict[str, bytes]) -> Path:
    return written(tmp_path / "made", content)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges and pieces of one block, so that little data makes many requests."""
    monkeypatch.setattr(download, "RANGE_BYTES", BLOCK)
    for module in (upload, session):
        monkeypatch.setattr(module, "PIECE_BYTES", BLOCK)


@pytest.fixture
def harmed(reach: Callable[[str], None]) -> Iterator[Callable[[str, Plan], FaultProxy]]:
    """Puts a proxy that follows a plan between the client and a server."""
    proxies: list[FaultProxy] = []

    def put_before(server: str, plan: Plan) -> FaultProxy:
        proxies.append(FaultProxy(server, plan))
        reach(proxies[-1].address)
        return proxies[-1]

    yield put_before
    for proxy in proxies:
        proxy.close()


def written(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kept(store: ObjectStore, prefix: str) -> dict[str, bytes]:
    return {name.removeprefix(f"{prefix}/"): entry.content for name, entry in store.entries.items()}


@pytest.mark.parametrize("seed", range(3))
def test_a_folder_goes_to_the_emulator_and_back_whole_through_a_network_that_does_harm(
    emulator: str, harmed: Callable[..., FaultProxy], folder: Path, content: dict[str, bytes], seed: int, tmp_path: Path
) -> None:
    proxy = harmed(emulator, seeded(seed, EMULATED))
    put_folder(folder, f"gs://feedback/{tmp_path.name}/model")
    assert read(fetch(f"gs://feedback/{tmp_path.name}/model", into=tmp_path / "into")) == content
    assert len(proxy.suffered) >= 5


@pytest.mark.parametrize("fault", FAULTS)
def test_each_failure_is_survived_when_it_happens_once_to_every_request(
    object_store: ObjectStore, harmed: Callable[..., FaultProxy], folder: Path, content: dict[str, bytes], fault: str
) -> None:
    proxy = harmed(object_store.address, first_time(fault))
    put_folder(folder, "gs://bucket/model")
    assert kept(object_store, "model") == content
    assert read(fetch("gs://bucket/model")) == content
    assert proxy.suffered[fault] >= 5


def test_a_piece_that_broke_off_goes_on_from_the_blocks_that_arrived(
    object_store: ObjectStore, harmed: Callable[..., FaultProxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (upload, session):
        monkeypatch.setattr(module, "PIECE_BYTES", 4 * BLOCK)
    data = random.Random(1).randbytes(6 * BLOCK + 9)
    harmed(object_store.address, lambda request, before: "half sent" if " bytes 0-" in request and not before else None)
    put_folder(written(tmp_path / "made", {"weights.bin": data}), "gs://bucket/model")
    total = len(data)
    assert [detail for method, _, detail in object_store.asked if method == "PUT"] == [
        f"bytes 0-{4 * BLOCK - 1}/{total}",
        f"bytes */{total}",
        f"bytes {2 * BLOCK}-{6 * BLOCK - 1}/{total}",
        f"bytes {6 * BLOCK}-{total - 1}/{total}",
    ]
    assert object_store.entries["model/weights.bin"].content == data


def test_ranges_of_one_object_and_files_of_a_folder_are_on_their_way_at_once(
    object_store: ObjectStore, harmed: Callable[..., FaultProxy], tmp_path: Path
) -> None:
    """Each of four requests is held until the other three have come."""
    together = threading.Barrier(4)

    def hold(request: str, before: int) -> None:
        if "bytes=" in request or request.startswith("POST"):
            together.wait(timeout=60)

    harmed(object_store.address, hold)
    data = random.Random(4).randbytes(4 * BLOCK)
    object_store.write("weights.bin", data)
    assert fetch("gs://bucket/weights.bin", into=tmp_path / "into").read_bytes() == data
    put_folder(written(tmp_path / "made", {f"{number}.txt": b"x" for number in range(4)}), "gs://bucket/model")
    assert not together.broken


def test_without_a_cache_to_write_to_a_download_goes_to_a_temporary_folder(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    object_store.write("model/a.txt", b"a")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for place in ("file", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
        found = fetch("gs://bucket/model")
        assert read(found) == {"a.txt": b"a"}
        assert found.is_relative_to(tmp_path / "cache" / "plumbline") == (place == "cache")
    object_store.write("model/a.txt", b"b")
    assert read(fetch("gs://bucket/model")) == {"a.txt": b"b"}
    assert read(found) == {"a.txt": b"a"}  # who reads it there goes on reading the same


@pytest.mark.parametrize("fault", ["cut", "short"])
def test_an_answer_that_ends_early_is_continued_from_where_it_ended(
    object_store: ObjectStore, harmed: Callable[..., FaultProxy], tmp_path: Path, fault: str
) -> None:
    data = random.Random(5).randbytes(BLOCK)
    object_store.write("weights.bin", data)
    harmed(object_store.address, lambda request, before: fault if "bytes=0-" in request else None)
    assert fetch("gs://bucket/weights.bin", into=tmp_path).read_bytes() == data
    ranges = [detail for _, _, detail in object_store.asked if detail.startswith("bytes=")]
    assert ranges == [f"bytes=0-{BLOCK - 1}", f"bytes={BLOCK // 2}-{BLOCK - 1}"]


@pytest.mark.parametrize("fault", ["503", "lost", "cut", "short", "damaged"])
def test_a_download_that_never_succeeds_is_one_message_and_leaves_nothing_under_the_name(
    object_store: ObjectStore, harmed: Callable[..., FaultProxy], tmp_path: Path, fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    object_store.write("model/weights.bin", b"x" * 3000)
    harmed(object_store.address, lambda request, before: fault if "/download/" in request else None)
    monkeypatch.setattr(patience, "PATIENCE", Patience(initial_s=0.001, maximum_s=0.01, total_s=0.2, silence_s=5))
    message = "crc32c.* 3 times in a row" if fault == "damaged" else r"\(tried for 0 s\)\. "
    with pytest.raises(InputError, match=rf"^gs://bucket/model.*{message}") as caught:
        fetch("gs://bucket/model", into=tmp_path / "into")
    assert "\n" not in str(caught.value)
    assert [name for name in read(tmp_path / "into") if not Path(name).name.startswith(".")] == []


@pytest.mark.parametrize("large", [False, True])
def test_an_upload_that_is_always_damaged_is_one_message_and_publishes_nothing(
    object_store: ObjectStore, harmed: Callable[..., FaultProxy], tmp_path: Path, large: bool
) -> None:
    made = written(tmp_path / "made", {"weights.bin": b"x" * (2 * BLOCK if large else 4000)})
    harmed(object_store.address, lambda request, before: "damaged")
    with pytest.raises(InputError, match=r"^gs://bucket/model/weights\.bin: .*does not arrive undamaged, 3 times"):
        put_folder(made, "gs://bucket/model")
    assert object_store.entries == {}
    assert "DELETE" not in {method for method, *_ in object_store.asked}  # nor was it there for a moment


@pytest.mark.parametrize("large", [False, True])
def test_what_a_store_took_that_compares_nothing_is_removed_again(
    object_store: ObjectStore, tmp_path: Path, large: bool
) -> None:
    object_store.damages = True
    made = written(tmp_path / "made", {"weights.bin": b"x" * (2 * BLOCK if large else 4000)})
    with pytest.raises(InputError, match=r"it became \S+ there and was removed again"):
        put_folder(made, "gs://bucket/model")
    assert object_store.entries == {}


def test_a_download_that_was_cut_off_fetches_only_the_ranges_that_are_missing(
    object_store: ObjectStore, harmed: Callable[..., FaultProxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(2).randbytes(5 * BLOCK)
    object_store.write("model/weights.bin", data)
    missing = f"bytes={3 * BLOCK}-{4 * BLOCK - 1}"
    proxy = harmed(object_store.address, lambda request, before: "503" if missing in request else None)
    monkeypatch.setattr(patience, "PATIENCE", Patience(initial_s=0.01, maximum_s=0.1, total_s=0.5, silence_s=5))
    with pytest.raises(InputError, match="Try again later"):
        fetch("gs://bucket/model")
    object_store.asked.clear()
    proxy.plan = lambda request, before: None
    assert read(fetch("gs://bucket/model")) == {"weights.bin": data}
    assert [detail for _, name, detail in object_store.asked if name] == [missing]
    object_store.asked.clear()
    assert read(fetch("gs://bucket/model")) == {"weights.bin": data}
    assert [name for _, name, _ in object_store.asked if name] == []  # it is there, and whole


def test_what_was_noted_and_is_damaged_on_disk_is_fetched_anew(object_store: ObjectStore, tmp_path: Path) -> None:
    data = random.Random(2).randbytes(3 * BLOCK)
    entry = object_store.write("weights.bin", data)
    header = f'{{"object": "gs://bucket/weights.bin", "generation": {entry.generation}}}'
    (tmp_path / ".weights.bin.part").write_bytes(bytes(3 * BLOCK))
    (tmp_path / ".weights.bin.part.jsonl").write_text(f"{header}\n0\n{BLOCK}\n")
    assert fetch("gs://bucket/weights.bin", into=tmp_path).read_bytes() == data
    assert len([1 for _, _, detail in object_store.asked if detail.startswith("bytes=")]) == 1 + 3
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"weights.bin", ".weights.bin.lock"}


def test_a_line_of_the_note_that_was_cut_off_counts_for_nothing(object_store: ObjectStore, tmp_path: Path) -> None:
    data = random.Random(2).randbytes(3 * BLOCK)
    entry = object_store.write("weights.bin", data)
    header = f'{{"object": "gs://bucket/weights.bin", "generation": {entry.generation}}}'
    (tmp_path / ".weights.bin.part").write_bytes(data[:BLOCK] + bytes(2 * BLOCK))
    (tmp_path / ".weights.bin.part.jsonl").write_text(f"{header}\n0\n{BLOCK}")  # of a larger number, it may be
    assert fetch("gs://bucket/weights.bin", into=tmp_path).read_bytes() == data
    assert len([1 for _, _, detail in object_store.asked if detail.startswith("bytes=")]) == 2


def test_another_generation_starts_anew(object_store: ObjectStore, tmp_path: Path) -> None:
    data = random.Random(2).randbytes(3 * BLOCK)
    entry = object_store.write("weights.bin", data)
    header = f'{{"object": "gs://bucket/weights.bin", "generation": {entry.generation - 1}}}'
    (tmp_path / ".weights.bin.part").write_bytes(bytes(3 * BLOCK))
    (tmp_path / ".weights.bin.part.jsonl").write_text(f"{header}\n0\n")
    assert fetch("gs://bucket/weights.bin", into=tmp_path).read_bytes() == data
    assert len([1 for _, _, detail in object_store.asked if detail.startswith("bytes=")]) == 3


def test_an_upload_that_was_cut_off_skips_what_is_there(
    object_store: ObjectStore, harmed: Callable[..., FaultProxy], folder: Path, content: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    proxy = harmed(object_store.address, lambda request, before: "503" if "PUT" in request else None)
    monkeypatch.setattr(patience, "PATIENCE", Patience(initial_s=0.01, maximum_s=0.1, total_s=0.5, silence_s=5))
    with pytest.raises(InputError, match=r"503.*tried for"):
        put_folder(folder, "gs://bucket/model", last="b.txt")
    there = set(kept(object_store, "model"))
    assert "weights.bin" not in there and "b.txt" not in there and "one.bin" in there
    proxy.plan = lambda request, before: None
    object_store.asked.clear()
    put_folder(folder, "gs://bucket/model", last="b.txt")
    assert kept(object_store, "model") == content
    posted = {name.removeprefix("model/") for method, name, _ in object_store.asked if method == "POST"}
    assert posted == content.keys() - there


def test_an_object_that_is_replaced_while_it_is_read_is_one_message(object_store: ObjectStore, tmp_path: Path) -> None:
    object_store.write("weights.bin", b"one")
    object_store.meanwhile["GET", "weights.bin"] = lambda: object_store.write("weights.bin", b"two")
    with pytest.raises(InputError, match=r"^gs://bucket/weights\.bin: was replaced or removed while it was being read"):
        fetch("gs://bucket/weights.bin", into=tmp_path)


def test_a_file_that_changes_while_it_is_uploaded_is_one_message_and_is_not_published(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    made = written(tmp_path / "made", {"log.bin": bytes(3 * BLOCK)})
    change = (made / "log.bin").write_bytes
    object_store.meanwhile["PUT", "model/log.bin"] = lambda: change(b"y" * 3 * BLOCK)
    with pytest.raises(InputError, match=r"log\.bin: changed while it was uploaded to gs://bucket/model/log\.bin"):
        put_folder(made, "gs://bucket/model")
    object_store.meanwhile["PUT", "model/log.bin"] = lambda: change(b"short")
    with pytest.raises(InputError, match=r"log\.bin: became shorter while it was uploaded"):
        put_folder(made, "gs://bucket/model")
    assert object_store.entries == {}


def test_an_object_that_was_stored_gzipped_is_checked_as_stored_and_arrives_as_its_name_says(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    rows = b'{"prompt": "a"}\n' * 50_000
    object_store.write("rows.jsonl", gzip.compress(rows, compresslevel=0), encoding="gzip")
    assert fetch("gs://bucket/rows.jsonl", into=tmp_path).read_bytes() == rows
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"rows.jsonl", ".rows.jsonl.lock"}


@pytest.mark.parametrize("name", ["model/../../out.txt", "model//a.txt", "model/./a.txt", "model/a\\b"])
def test_an_object_whose_name_is_no_files_name_is_refused(object_store: ObjectStore, tmp_path: Path, name: str) -> None:
    object_store.write(name, b"x")
    with pytest.raises(InputError, match=r"^gs://bucket/model: holds 'model/.*rename or remove it"):
        fetch("gs://bucket/model", into=tmp_path / "a" / "b")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("below", ["", "/below"])
def test_an_object_that_is_a_folder_too_is_one_message(object_store: ObjectStore, tmp_path: Path, below: str) -> None:
    for name in (f"model{below}", f"model{below}/a.txt"):
        object_store.write(name, b"x")
    with pytest.raises(InputError, match=f"^gs://bucket/model{below} is an object and a folder of objects too"):
        fetch("gs://bucket/model", into=tmp_path)


def test_a_server_that_knows_no_ranges_is_found_out(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from google.cloud.storage import Blob

    object_store.write("weights.bin", bytes(2 * BLOCK))
    whole = Blob.download_to_file
    monkeypatch.setattr(
        Blob, "download_to_file", lambda blob, file, start, end, **options: whole(blob, file, **options)
    )
    with pytest.raises(InputError, match="the server sends more than the range it was asked for"):
        fetch("gs://bucket/weights.bin", into=tmp_path)


def test_a_long_transfer_shows_its_progress_in_megabytes_and_a_short_one_nothing(
    object_store: ObjectStore, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_folder(folder, "gs://bucket/short")
    fetch("gs://bucket/short")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(parallel, "LONG_BYTES", 1000)
    put_folder(folder, "gs://bucket/long")
    fetch("gs://bucket/long")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line == "progress long MB 2/2"] == ["progress long MB 2/2"] * 2


def test_memory_stays_flat_however_large_the_file_is(reach: Callable[[str], None], tmp_path: Path) -> None:
    """The peak of the process, for a file of 16 MB and one of 256 MB, down and up; both servers make bytes up."""
    store = ObjectStore(keep=False)
    reach(store.address)
    for name, size in (("small", 16 << 20), ("large", 256 << 20)):
        store.write(f"down/{name}", bytes(range(256)) * 4096, size=size)
        (tmp_path / "up" / name).mkdir(parents=True)
        with (tmp_path / "up" / name / "file").open("wb") as file:
            file.truncate(size)
    code = f"""if True:
        import resource
        from pathlib import Path
        from components.storage import fetch, put_folder
        place = Path({str(tmp_path)!r})
        for name in ("small", "large"):
            fetched = fetch(f"gs://bucket/down/{{name}}", into=place / "into")
            put_folder(place / "up" / name, f"gs://bucket/up/{{name}}")
            print("peak", fetched.stat().st_size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        """
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    store.close()
    assert done.returncode == 0, done.stderr
    peaks = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("peak")]
    (small, before), (large, after) = (map(int, peak) for peak in peaks)
    assert (small, large) == (16 << 20, 256 << 20)
    assert store.entries["up/large/file"].size == 256 << 20
    assert (after - before) * 1024 < 48 << 20  # ru_maxrss is in KiB


def test_the_first_part_that_fails_ends_the_others_at_once() -> None:
    stop, begun = threading.Event(), threading.Event()
    waits = Patience(initial_s=600, maximum_s=600, total_s=6000)

    def wait() -> None:
        begun.set()
        waits.insist(lambda: (_ for _ in ()).throw(ConnectionError("away")), "gs://bucket/a", stop)

    def fail() -> None:
        begun.wait()
        raise InputError("no such bucket")

    started = time.monotonic()
    with pytest.raises(InputError, match="no such bucket"):
        in_parallel([wait, wait, fail], stop)
    assert time.monotonic() - started < 60
    with pytest.raises(Stopped):
        waits.insist(lambda: None, "gs://bucket/a", stop)


def test_waits_are_drawn_below_a_bound_that_doubles_and_end_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float]] = []
    monkeypatch.setattr(random, "uniform", lambda low, high: drawn.append((low, high)) or high / 10_000)
    failures: list[Exception] = [*[ConnectionError("away")] * 5, ValueError("a mistake")]

    def fail() -> None:
        raise failures.pop(0)

    with pytest.raises(ValueError, match="a mistake"):
        Patience(initial_s=1, maximum_s=8, total_s=600).insist(fail, "gs://bucket/a")
    assert drawn == [(0, 1), (0, 2), (0, 4), (0, 8), (0, 8), (0, 8)]
    failures = [ConnectionError("away"), ValueError("never reached")]
    with pytest.raises(ConnectionError, match="away"):
        Patience(total_s=0).insist(fail, "gs://bucket/a")


def transience() -> list[tuple[Exception, bool]]:
    import requests
    import urllib3
    from google.api_core.exceptions import from_http_status
    from google.auth.exceptions import RefreshError, TransportError

    codes = {429: True, 500: True, 502: True, 503: True, 504: True, 408: True}
    codes |= {400: False, 401: False, 403: False, 404: False, 412: False, 416: False}
    return [
        *((from_http_status(code, "said"), again) for code, again in codes.items()),
        (requests.ConnectionError("refused"), True),
        (requests.ReadTimeout("silence"), True),
        (requests.exceptions.ChunkedEncodingError("cut"), True),
        (urllib3.exceptions.ProtocolError("cut"), True),
        (urllib3.exceptions.ReadTimeoutError(None, None, "silence"), True),  # type: ignore[arg-type]
        (TransportError("no answer"), True),
        (ConnectionResetError("reset"), True),
        (TimeoutError("timed out"), True),
        (requests.exceptions.SSLError("EOF occurred in violation of protocol"), True),
        (requests.exceptions.SSLError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"), False),
        (RefreshError("revoked"), False),
        (OSError(28, "No space left on device"), False),
        (InputError("changed"), False),
    ]


@pytest.mark.parametrize(("error", "again"), transience(), ids=lambda value: str(value)[:40])
def test_what_may_pass_is_tried_again_and_nothing_else(error: Exception, again: bool) -> None:
    assert is_transient(error) == again


def test_the_checksum_is_that_of_the_standard_and_the_same_for_bytes_and_files(tmp_path: Path) -> None:
    """RFC 3720, B.4: 32 bytes of zeros give 0x8A9136AA; Google states it big-endian in base64."""
    assert bytes_crc32c(bytes(32)) == "ipE2qg=="
    (tmp_path / "file").write_bytes(bytes(range(256)) * 9000)
    assert file_crc32c(tmp_path / "file") == bytes_crc32c(bytes(range(256)) * 9000)


def test_the_emulator_keeps_what_was_put_there_by_pieces(bucket: str, folder: Path, content: dict[str, bytes]) -> None:
    put_folder(folder, f"{bucket}/model")
    assert list_names(f"{bucket}/model") == sorted(content)
    assert get_text(f"{bucket}/model/b.txt").content == content["b.txt"].decode("latin-1")
