"""What is measured of phases: seconds, tokens and peaks that belong to one phase each, and add up to the whole."""

from pathlib import Path
from typing import Any

import pytest
import torch

from components import phases as measured
from components.phases import MB, Phases, ResidentMemory, measurable_memory

LINUX = pytest.mark.skipif(measurable_memory() is None, reason="the kernel tells no peak of a phase")


class Hands:
    """A clock that stands still until it is moved, and a memory that is filled as far as it is told."""

    def __init__(self) -> None:
        self.at, self.held, self.highest = 100.0, 0, 0

    def __call__(self) -> float:
        return self.at

    def pass_by(self, seconds: float, highest: int = 0) -> None:
        self.at += seconds
        self.highest = max(self.highest, highest)

    def peak(self) -> int:
        highest, self.highest = max(self.highest, self.held), self.held
        return highest


@pytest.fixture
def hands() -> Hands:
    return Hands()


def test_the_innermost_phase_has_the_time_and_all_add_up(hands: Hands) -> None:
    phases = Phases(clock=hands)
    hands.pass_by(1)
    with phases.phase("decode"):
        hands.pass_by(2)
        with phases.phase("prefill"):
            hands.pass_by(4)
        hands.pass_by(8)
        with phases.phase("prefill"):
            hands.pass_by(16)
    hands.pass_by(32)
    assert phases.lap() == {"perf/prefill_s": 20, "perf/decode_s": 10, "perf/other_s": 33, "perf/seconds": 63}


def test_a_lap_begins_where_the_one_before_it_ended(hands: Hands) -> None:
    phases = Phases(clock=hands)
    with phases.phase("update", 6):
        hands.pass_by(2)
        assert phases.lap() == {
            "perf/update_s": 2, "perf/update_tokens_per_s": 3, "perf/other_s": 0, "perf/seconds": 2,
        }  # fmt: skip
        hands.pass_by(1)
    hands.pass_by(4)
    assert phases.lap() == {"perf/update_s": 1, "perf/other_s": 4, "perf/seconds": 5}


def test_tokens_are_divided_by_the_seconds_of_their_phase_alone(hands: Hands) -> None:
    phases = Phases(clock=hands)
    with phases.phase("decode"):
        hands.pass_by(5)
        with phases.phase("prefill", 30):
            hands.pass_by(2)
        with phases.phase("prefill", 10):
            hands.pass_by(3)
    phases.count("decode", 15)
    metrics = phases.lap()
    assert metrics["perf/prefill_tokens_per_s"] == 8 and metrics["perf/decode_tokens_per_s"] == 3
    assert "perf/other_tokens_per_s" not in metrics


def test_no_rate_is_said_of_a_phase_that_took_no_time(hands: Hands) -> None:
    phases = Phases(clock=hands)
    with phases.phase("score", 10):
        pass
    assert phases.lap() == {"perf/score_s": 0, "perf/other_s": 0, "perf/seconds": 0}


def test_a_phase_that_is_broken_off_is_over(hands: Hands) -> None:
    phases = Phases(clock=hands)

    def fails() -> None:
        with phases.phase("score"):
            hands.pass_by(1)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    hands.pass_by(2)
    assert phases.lap() == {"perf/score_s": 1, "perf/other_s": 2, "perf/seconds": 3}


def test_each_phase_has_the_peak_of_its_own_moments(hands: Hands) -> None:
    hands.highest = 10**9  # before it all
    phases = Phases(hands, hands)
    hands.held = 20 * 10**6
    with phases.phase("decode"):
        hands.pass_by(1, 70 * 10**6)
        with phases.phase("prefill"):
            hands.pass_by(1, 90 * 10**6)
        hands.pass_by(1, 40 * 10**6)
    metrics = phases.lap()
    peaks = {name: value for name, value in metrics.items() if name.endswith("_mb")}
    assert peaks == {"perf/prefill_peak_mb": 90, "perf/decode_peak_mb": 70, "perf/other_peak_mb": 20}
    with phases.phase("decode"):
        hands.pass_by(1)
    assert phases.lap()["perf/decode_peak_mb"] == 20


def test_without_memory_to_measure_there_are_no_peaks(hands: Hands) -> None:
    phases = Phases(clock=hands)
    with phases.phase("decode"):
        hands.pass_by(1, 70 * 10**6)
    assert not [name for name in phases.lap() if name.endswith("_mb")]


@LINUX
def test_what_a_phase_holds_for_a_moment_is_its_own_peak_and_no_other_s() -> None:
    phases, size = Phases(measurable_memory()), 64 * 10**6
    with phases.phase("score"):
        pass
    with phases.phase("reference"):
        measured._hold(size)  # an allocator might have had the room already
    with phases.phase("read"):
        pass
    metrics = phases.lap()
    before, during, after = (metrics[f"perf/{name}_peak_mb"] for name in ("score", "reference", "read"))
    assert during - max(before, after) == pytest.approx(size / MB, abs=4)


@LINUX
def test_memory_is_found_measurable_every_time() -> None:
    assert all(measurable_memory() for _ in range(5))  # an allocator may keep what the first time was given back


def process_folder(folder: Path, status: str = "Name:\tpython\nVmHWM:\t    2000 kB\nVmRSS:\t    1000 kB\n") -> Path:
    (folder / "status").write_text(status)
    (folder / "clear_refs").touch()
    return folder


def test_the_kernel_s_peak_is_read_and_started_over(tmp_path: Path) -> None:
    assert ResidentMemory(process_folder(tmp_path)).peak() == 2000 * 1024
    assert (tmp_path / "clear_refs").read_text() == "5"


def test_memory_is_not_measured_where_the_peak_stays_what_it_was(tmp_path: Path) -> None:
    assert measurable_memory(process_folder(tmp_path)) is None


def test_memory_is_not_measured_where_no_peak_is_told(tmp_path: Path) -> None:
    assert measurable_memory(tmp_path / "absent") is None
    assert measurable_memory(process_folder(tmp_path, "Name:\tpython\n")) is None


def test_memory_is_not_measured_where_the_peak_cannot_be_started_over(tmp_path: Path) -> None:
    (process_folder(tmp_path) / "clear_refs").unlink()
    (tmp_path / "clear_refs").mkdir()  # which nobody may write, not even root
    assert measurable_memory(tmp_path) is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of a GPU that is pretended, in order."""
    asked: list[str] = []

    def answers(name: str, answer: Any = None) -> None:
        monkeypatch.setattr(torch.cuda, name, lambda: asked.append(name) or answer)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name in ("init", "synchronize", "reset_peak_memory_stats"):
        answers(name)
    answers("max_memory_allocated", 3 * 10**9)
    return asked


def test_on_a_gpu_its_tensors_are_measured_and_its_queue_is_waited_for(gpu: list[str]) -> None:
    memory = measurable_memory(Path("/absent"))
    assert memory and gpu == ["init"]
    gpu.clear()
    phases = Phases(memory)
    with phases.phase("update"):
        gpu.clear()
    assert gpu == ["synchronize", "max_memory_allocated", "reset_peak_memory_stats"]
    assert phases.lap()["perf/update_peak_mb"] == 3000


def test_a_process_without_a_gpu_in_use_waits_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("waited"))
    assert 0 <= measured.now() < measured.now()
