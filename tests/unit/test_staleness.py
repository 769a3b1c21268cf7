"""The table of sampling ahead: speed by the clock, ratios seed by seed, differences prompt by prompt."""

from pathlib import Path
from typing import Any

import pytest

from overlap import parsed, settings, verdict
from staleness import Run, draw, table


def history(seconds: float, **metrics: float) -> list[dict[str, Any]]:
    """Three batches of 10 samples, each `seconds` after the one before."""
    return [{"time": 100 + number * seconds, "rollout/samples": 10.0, **metrics} for number in range(3)]


RUNS = [
    Run(0, None, 1, history(2.0), [1.0, 0.0, 0.0, 1.0]),
    Run(0, None, 2, history(1.0), [1.0, 1.0, 0.0, 0.0]),
    Run(0, 1, 2, history(0.5, **{"sampler/effective": 0.75}), [1.0, 1.0, 1.0, 0.0]),
    Run(1, None, 1, history(2.0), [0.0] * 4),
    Run(1, None, 2, history(1.0), [0.0] * 4),
    Run(1, 1, 2, history(1.0, **{"sampler/effective": 0.25}), [0.0] * 4),
]


def test_speed_leaves_out_the_first_batch() -> None:
    assert RUNS[0].speed == pytest.approx(20 / 4) and RUNS[2].speed == pytest.approx(20 / 1)


def test_every_way_is_compared_with_the_fastest_in_turn_seed_by_seed_and_prompt_by_prompt() -> None:
    one, two, ahead = table(RUNS).splitlines()[2:]
    assert one.startswith("| in turn, 1 thread | 5.0 (5.0, 5.0) | 0.50 (0.50, 0.50) | 0.250 ")
    assert two.startswith("| in turn, 2 threads | 10.0 (10.0, 10.0) | 1.00 (1.00, 1.00) | 0.250 ")
    assert two.endswith("|  |  |  |")
    assert ahead.startswith("| ahead, staleness 1 | 15.0 (20.0, 10.0) | 1.50 (2.00, 1.00) | 0.375 ")
    assert "| +0.125 [+0.000, " in ahead and ahead.endswith("| 0.5 |  |")


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw(RUNS, tmp_path / name)
    assert (tmp_path / "a").read_bytes().count(b"<path") > 20
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("helpful", "harmful", "expected"), [(True, None, 1), (False, None, 0), (None, False, 1), (None, True, 0)]
)
def test_gold_is_help_or_no_harm(helpful: bool | None, harmful: bool | None, expected: float) -> None:
    assert verdict({"helpful": helpful, "harmful": harmful}) == expected


def test_in_turn_is_measured_with_one_thread_and_with_all() -> None:
    assert settings((0, 2), 2) == [
        ("turn-1", 1, None), ("turn-2", 2, None), ("ahead-0", 2, 0), ("ahead-2", 2, 2),
    ]  # fmt: skip
    assert settings((1,), 1) == [("turn-1", 1, None), ("ahead-1", 1, 1)]
    assert parsed(["a", "b", "--staleness", "1,4"]).staleness == (1, 4)
