"""Progress lines."""

import pytest

from components import progress
from components.progress import Progress


def test_the_first_and_the_last_are_printed_and_between_them_one_in_two_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    work = Progress("sft", 5)
    for _ in range(5):
        work.advance(loss=0.123456)
        now += 1.0
    assert capsys.readouterr().out.splitlines() == [
        "progress sft 1/5 loss=0.1235",
        "progress sft 3/5 loss=0.1235",
        "progress sft 5/5 loss=0.1235",
    ]


def test_several_may_be_counted_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("responses", 64).advance(64)
    assert capsys.readouterr().out == "progress responses 64/64\n"
