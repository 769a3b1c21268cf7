"""`make growth`: the grid, the table and the picture of what a step costs as it grows."""

from pathlib import Path
from typing import Any

import pytest

import growth
import ours
import workload
from growth import Growth, Point
from measurement import STANDARD, Load, Measurement, Task


def point(batch: int, length: int, seconds: float, memory: float) -> Point:
    return Point(batch, length, Measurement([99.0, seconds, 0.1], float(length), memory + 100, memory, 1))


def made() -> Growth:
    shorter = [point(16, 64, 1.0, 50.0), point(32, 64, 2.0, 60.0), point(256, 64, 24.0, 90.0)]
    return Growth(growth.parsed(["--threads", "1"]), [*shorter, point(32, 512, 20.0, 240.0)], [1.0, 2.5, 1.2, 1.1])


def test_a_process_is_told_its_whole_load() -> None:
    task = Task("rloo", Path("there"), "1m", "bf16", 2, Load(responses=8, response_tokens=16, micro=4), "cuda")
    assert Task.parse("", task.arguments) == task
    assert Task.parse("", ["sft", "there"]).load == STANDARD


def test_a_step_takes_in_the_load_it_is_given(tmp_path: Path) -> None:
    load = Load(rows=4, responses=8, prompt_tokens=32, response_tokens=16, micro=4, decoded=8)
    workload.build(tmp_path, ["1m"], 1, load=load)
    settings = ours.online(task := Task("rloo", tmp_path, "1m", "fp32", 1, load))
    assert (settings.minibatch_size, settings.micro_batch_size, settings.generation.batch_size) == (8, 4, 8)
    found = ours.measure(task)
    assert found.response_tokens is not None and 8 < found.response_tokens <= 16
    assert ours.measure(Task("dpo", tmp_path, "1m", "fp32", 1, load)).response_tokens is None


def test_the_table_has_rates_and_what_the_dearest_costs() -> None:
    lines = growth.report(made()).splitlines()
    assert "1 threads" in lines[0] and "rloo, 7m, fp32. Median of 3 steps. Load average 1.0 to 2.5." in lines[0]
    assert "- 8 times the length: 10.0 times the seconds, 4.00 times the memory above the start." in lines
    assert "- 16 times the batch: 24.0 times the seconds, 1.80 times the memory above the start." in lines
    # 32 responses of 512 tokens in 20 s: 1.6 responses and 819.2 tokens a second
    assert "| 32 | 512.0 | 20.000 (0.100 to 99.000) | 1.6 | 819 | 340 (240) |" in lines


def test_every_length_and_batch_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Load]] = []

    class Recorder:
        def run(self, script: str, *arguments: object) -> tuple[int, str]:
            assert script == "workload.py" and arguments[arguments.index("--responses") + 1] == "256"
            return 0, ""

    def measured(children: Any, system: str, task: Task) -> tuple[Measurement, str]:
        asked.append((system, task.load))
        return Measurement([1.0], 1.0, 2.0, 1.0, 1), ""

    monkeypatch.setattr(growth, "measured", measured)
    found = Growth(growth.parsed([]))
    assert growth.measure(found, Path(), Recorder()) == ""  # type: ignore[arg-type]
    sizes = [(load.responses, load.response_tokens) for system, load in asked if system == "ours"]
    assert sizes == [(16, 64), (32, 64), (32, 128), (32, 256), (32, 512), (64, 64), (128, 64), (256, 64)]
    assert [p.length for p in found.longer] == [64, 128, 256, 512]
    assert [p.batch for p in found.larger] == [16, 32, 64, 128, 256]
    assert len(found.loads) == 8 and min(found.loads) >= 0


def test_a_failed_measurement_ends_the_run_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "measured", lambda *_: (None, "exit code 1: out of memory"))
    children: Any = type("Calm", (), {"run": lambda *_: (0, "")})()
    assert growth.measure(Growth(growth.parsed([])), Path(), children) == (
        "16 responses of 64 tokens: exit code 1: out of memory"
    )


def test_the_same_numbers_give_the_same_small_picture(tmp_path: Path) -> None:
    growth.draw(made(), tmp_path / "one.svg")
    growth.draw(made(), tmp_path / "two.svg")
    picture = (tmp_path / "one.svg").read_text("utf-8")
    assert picture == (tmp_path / "two.svg").read_text("utf-8")
    assert all(label in picture for label in ("tokens a response", "responses a second", "MB above the start", "512"))
    assert len(picture) < 60_000


def test_only_the_whole_run_is_written_down() -> None:
    assert growth.parsed([]).whole and growth.parsed(["--threads", "1", "--steps", "5"]).whole
    for part in (["--quick"], ["--size", "1m"], ["--dtype", "bf16"]):
        assert not growth.parsed(part).whole
    assert growth.parsed(["--quick"]).lengths == (64, 128)
