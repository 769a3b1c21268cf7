"""Which of several processes' endings is the step's; the processes themselves are started in tests/cluster."""

from pathlib import Path

import pytest

from components.errors import InputError, TrainingFailure
from components.processes import Ending, Job, endings, enter, leave, raise_first
from components.termination import Terminated

DONE = [Ending(0, "done", "", 1.0), Ending(1, "done", "", 2.0)]


def ended(rank: int, kind: str, message: str = "", time: float = 1.0) -> Ending:
    return Ending(rank, kind, message, time)  # type: ignore[arg-type]


def test_a_job_comes_back_from_the_environment() -> None:
    paths = {"data": Path("/d"), "raw": None}
    job = Job("sft", {"seed": 3.0, "training": {"epochs": 2}}, paths, Path("/m.json"), "sft", "gs://b/x")
    assert Job.read(job.written()) == job


def test_all_done_is_no_error() -> None:
    raise_first(DONE, 2, True, asked=False)


LOST = ended(0, "lost", "RuntimeError: [gloo] Connection closed by peer", 1.5)


@pytest.mark.parametrize(
    ("found", "asked", "error", "words"),
    [
        ([ended(1, "input", "k is 3"), ended(0, "input", "k is 3", 2.0)], False, InputError, "^k is 3$"),
        ([ended(1, "training", "skipped"), LOST], False, TrainingFailure, "^process 2 of 2: skipped$"),
        ([LOST, ended(1, "error", "KeyError: 'x'", 2.0)], False, TrainingFailure, "^process 2 of 2: KeyError: 'x'$"),
        ([LOST], False, TrainingFailure, "^process 2 of 2 ended without a word.*for want of memory"),
        ([], False, TrainingFailure, "^process 1 of 2 ended without a word"),
        ([LOST, ended(1, "lost", "TCPStore", 2.0)], False, TrainingFailure, "^process 1 of 2 lost the others: Runtime"),
        ([ended(0, "stopped"), ended(1, "stopped", "", 2.0)], True, Terminated, "stopped by SIGTERM"),
        ([ended(0, "stopped"), ended(1, "lost", "gloo", 2.0)], True, Terminated, "stopped by SIGTERM"),
        ([ended(0, "stopped"), ended(1, "input", "full", 2.0)], True, InputError, "^full$"),
        ([ended(0, "stopped")], False, TrainingFailure, "^process 2 of 2 ended without a word"),
    ],
)
def test_the_first_to_fail_is_the_step_s_failure(
    found: list[Ending], asked: bool, error: type[BaseException], words: str
) -> None:
    with pytest.raises(error, match=words):
        raise_first(found, 2, False, asked)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (None, "done", ""),
        (InputError("no rows"), "input", "no rows"),
        (TrainingFailure("gave up"), "training", "gave up"),
        (Terminated(), "stopped", str(Terminated())),
        (RuntimeError("gloo: Connection closed by peer"), "lost", "RuntimeError: gloo: Connection closed by peer"),
        (ZeroDivisionError("division by zero"), "error", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_process_leaves_word_of_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, kind: str, message: str
) -> None:
    monkeypatch.setenv("PLUMBLINE_ENDINGS", str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    enter()
    leave(error)
    (found,) = endings(str(tmp_path), 2)
    assert (found.rank, found.kind, found.message) == (1, kind, message)
    assert [path.name for path in tmp_path.glob("*.pid")] == ["1.pid"]


def test_without_anybody_to_tell_nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PLUMBLINE_ENDINGS", raising=False)
    monkeypatch.chdir(tmp_path)
    enter()
    leave(None)
    assert not list(tmp_path.iterdir())
