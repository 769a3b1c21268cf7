"""Work in a process of its own: numbered results from numbered weights, whatever happens to the process."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from components.errors import InputError, TrainingFailure
from components.generation import overlap as overlap_module
from components.generation.making import _take_gpu
from components.generation.overlap import Overlap
from components.generation.versions import Versions
from scripted import scripted

ROOT = Path(__file__).parents[2]
GONE_S = 30.0
"""More than the second or two that it takes, for a busy machine."""


def weights(value: float) -> list[Tensor]:
    return [torch.full((3,), float(value)), torch.full((2, 2), value + 0.5)]


def test_a_version_stays_as_it_was_written_until_as_many_more_are() -> None:
    versions = Versions(weights(0), slots=2)
    live, read = weights(1), weights(0)
    versions.write(1, live)
    live[0].fill_(7)
    versions.write(2, weights(2))
    versions.read(1, read)
    assert all(torch.equal(a, b) for a, b in zip(read, weights(1), strict=True))
    versions.write(3, weights(3))
    with pytest.raises(AssertionError, match="version 1 was asked for, 3 is there"):
        versions.read(1, read)
    with pytest.raises(AssertionError, match="version 5 was asked for"):
        versions.read(5, read)


def test_the_memory_of_versions_has_no_name_and_ends_with_them() -> None:
    def held() -> list[str]:
        targets = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return [target for target in targets if "plumbline" in target]

    shared, before = sorted(Path("/dev/shm").iterdir()), held()
    versions = Versions(weights(0), slots=2)
    assert sorted(Path("/dev/shm").iterdir()) == shared and len(held()) > len(before)
    del versions
    assert held() == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("script")


@pytest.fixture(scope="module")
def working(folder: Path) -> Iterator[Overlap]:
    """A process that waits for a file in the middle of number 1, and refuses number 9."""
    made = scripted(folder, {1: "stay", 9: "refuse"}, staleness=1)
    with closing(made):
        yield made


def test_results_come_in_order_each_from_the_weights_named_for_it(working: Overlap, folder: Path) -> None:
    live = weights(0)
    working.versions.write(0, live)
    working.ask(0, 0)
    working.ask(1, 0)
    assert working.wait(0).tensors["count"] == 1
    for sent in (signal.SIGINT, signal.SIGTERM):  # what a terminal and a cluster send to the whole group
        os.kill(pid(folder, 1), sent)
    for tensor in live:
        tensor.fill_(1)  # an update, while number 1 is made
    working.versions.write(1, live)
    working.ask(2, 1)
    assert 1 not in working.made
    (folder / "go 1").touch()
    second, third = working.wait(1), working.wait(2)
    assert [second.tensors["count"], third.tensors["count"]] == [2, 3]
    assert torch.equal(second.tensors["0"], weights(0)[0]) and torch.equal(second.tensors["1"], weights(0)[1])
    assert torch.equal(third.tensors["0"], torch.ones(3))
    assert third.state == {"count": torch.tensor(3.0)} and third.metrics["made"] == 2
    assert third.metrics["perf/idle_s"] >= 0


def test_results_are_kept_until_they_are_forgotten(working: Overlap) -> None:
    assert set(working.made) == {0, 1, 2}
    working.forget(2)
    assert set(working.made) == {2}


def test_what_a_person_can_fix_is_told_as_it_is_here(working: Overlap) -> None:
    working.ask(9, 1)
    for _ in range(2):  # it is not started again
        with pytest.raises(InputError, match=r"^number 9 is odd; give an even one\.$"):
            working.wait(9)


def test_one_that_died_makes_what_was_under_way_again_and_one_that_keeps_dying_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    made = scripted(tmp_path, {1: "die once", 3: "die"}, staleness=1, restarts=1)
    made.versions.write(0, weights(5))
    with closing(made), caplog.at_level(logging.WARNING):
        for number in (0, 1, 2):
            made.ask(number, 0)
        assert made.wait(2).tensors["count"] == 3  # as if nothing had happened
        assert all(torch.equal(made.wait(number).tensors["0"], weights(5)[0]) for number in range(3))
        assert "was ended by SIGKILL while it made batch 2; it is started again" in caplog.text
        made.ask(3, 0)
        with pytest.raises(TrainingFailure) as failure:
            made.wait(3)
    assert "was ended by SIGKILL while it made batch 4, death number 2 in a row" in str(failure.value)
    assert "rl.overlap.restarts allows 1. Its last words: last words of 3" in str(failure.value)
    assert capfd.readouterr().err.count("last words of 3") == 2  # passed on


def test_one_that_does_not_come_back_is_taken_for_dead_and_what_goes_wrong_inside_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = scripted(tmp_path, {1: "hang once", 2: "fail"}, restarts=1, limit_s=60)
    made.versions.write(0, weights(0))
    with closing(made):
        made.ask(0, 0)
        made.wait(0)
        made.settings = made.settings.model_copy(update={"limit_s": 0.5})
        made.ask(1, 0)
        made.ask(2, 0)
        first = pid(tmp_path, 1)
        started = time.monotonic()
        made._start, start = (lambda: None), made._start  # type: ignore[method-assign]  # the next has time to load
        with pytest.raises(AssertionError):  # there is none to wait for
            made.wait(1)
        assert time.monotonic() - started < GONE_S and not alive(first)
        assert "gave no result for rl.overlap.limit_s, 0.5 seconds, while it made batch 2" in caplog.text
        made.settings = made.settings.model_copy(update={"limit_s": 60})
        start()
        assert made.wait(1).tensors["count"] == 2
        with pytest.raises(RuntimeError, match=r"(?s)process failed:\nTraceback.*ZeroDivisionError: number 2"):
            made.wait(2)


def test_a_process_ends_with_its_parent_in_the_middle_of_its_work(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from scripted import scripted; import torch\n"
        "if __name__ == '__main__':\n"
        "    made = scripted(Path(sys.argv[1]), {0: 'hang'})\n"
        "    made.versions.write(0, [torch.zeros(3), torch.zeros(2, 2)])\n"
        "    made.ask(0, 0); made.wait(0)\n"
    )
    (tmp_path / "main.py").write_text(script)
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py"), str(tmp_path)], env=os.environ | {"PYTHONPATH": path}
    )
    try:
        worker = pid(tmp_path, 0)
        assert alive(worker)
    finally:
        parent.kill()
        parent.wait()
    ended = time.monotonic() + GONE_S
    while alive(worker) and time.monotonic() < ended:
        time.sleep(0.02)
    assert not alive(worker)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    there = torch.cuda.device_count()
    with pytest.raises(InputError, match=rf"rl\.overlap\.gpu is {there}; accepted: below {there}"):
        _take_gpu(there)


@pytest.mark.parametrize(
    ("staleness", "threads", "expected"),
    [(1, None, (2, 2)), (1, 3, (3, 1)), (1, 9, (9, 1)), (0, None, (4, 4)), (0, 1, (1, 4))],
)
def test_threads_are_shared_where_both_compute_at_once(
    staleness: int, threads: int | None, expected: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [4]
    monkeypatch.setattr(overlap_module.torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(overlap_module.torch, "set_num_threads", lambda number: now.__setitem__(0, number))
    made = scripted(tmp_path, {}, staleness=staleness, threads=threads)
    assert (made._share_threads(), now[0]) == expected
    made.close()
    assert now[0] == 4


def pid(folder: Path, number: int) -> int:
    """The process that has begun with a number, once it has."""
    path = folder / f"begun {number}"
    ended = time.monotonic() + 120
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < ended
        time.sleep(0.005)
    return int(path.read_text())


def alive(process: int) -> bool:
    """Whether there is such a process; one that nobody has waited for is none."""
    with suppress(OSError):
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    return False
