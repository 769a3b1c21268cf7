"""SIGTERM: noted while something is watched, at once where that is allowed, and as ever elsewhere."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from components.termination import EXIT_CODE, Terminated, Watch, watch

ROOT = Path(__file__).parents[2]


def ask() -> None:
    """What a cluster does before it takes a machine away; Python runs the handler at the next line."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0)


def test_the_signal_is_noted_and_raises_when_it_is_asked_for() -> None:
    with watch() as noted:
        noted.check()
        ask()
        assert noted.requested
        with pytest.raises(Terminated):
            noted.check()


def test_inside_interruptible_the_signal_raises_at_once_and_outside_it_does_not() -> None:
    def evaluate() -> None:
        reached.append("begun")
        ask()
        reached.append("done")

    reached: list[str] = []
    with watch() as noted:
        with pytest.raises(Terminated), noted.interruptible():
            evaluate()
        assert noted.requested and reached == ["begun"]
        ask()  # a second one, while a checkpoint is written
        with pytest.raises(Terminated), noted.interruptible():
            evaluate()  # it came before
        assert reached == ["begun"]


def test_an_exception_inside_interruptible_leaves_the_signal_noted_only() -> None:
    with watch() as noted:
        with pytest.raises(ValueError, match="broken"), noted.interruptible():
            raise ValueError("broken")
        ask()
        assert noted.requested


def test_the_handler_before_is_put_back() -> None:
    def stopped() -> None:
        with watch() as noted:
            assert signal.getsignal(signal.SIGTERM) != before
            ask()
            noted.check()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated):
        stopped()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_watch_inside_a_watch_is_the_same_and_only_notes_the_signal_until_its_end() -> None:
    reached = []

    def step() -> None:
        with watch() as outer, outer.interruptible():
            with watch() as inner:
                assert inner is outer
                ask()
                reached.append("the update at hand is done")
            reached.append("not this")

    with pytest.raises(Terminated):
        step()
    assert reached == ["the update at hand is done"]


def test_a_signal_whose_exception_was_swallowed_is_still_noted_inside() -> None:
    with watch() as outer, suppress(Terminated), outer.interruptible():
        with suppress(Terminated):
            ask()
        with watch() as inner:
            assert inner.requested


def test_a_watch_after_a_watch_is_a_new_one() -> None:
    with watch():
        ask()
    with watch() as noted:
        noted.check()
        assert not noted.requested


def test_off_the_main_thread_a_watch_never_fires() -> None:
    seen: list[Watch] = []

    def watching() -> None:
        with watch() as noted, noted.interruptible():
            noted.check()
            seen.append(noted)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=watching)
    thread.start()
    thread.join()
    assert [noted.requested for noted in seen] == [False]
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_catches_every_exception_does_not_catch_it() -> None:
    assert not issubclass(Terminated, Exception)
    assert EXIT_CODE == 143


def test_before_anything_is_watched_the_process_dies_of_it() -> None:
    code = "import components.termination, os, signal; os.kill(os.getpid(), signal.SIGTERM); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")
