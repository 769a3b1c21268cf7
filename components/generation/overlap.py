"""Sampling ahead: results made in a process of its own while this one does something else with those before.

Results are made in the order in which they are asked for, each with the version of the weights that was named for it.
The process is watched wherever one of them is waited for: when it dies or does not come back, it is started again,
goes on from the state after its last result, and makes what was under way again with the same weights, so that a result
does not depend on what happened meanwhile.
"""

import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor

from components.errors import InputError, TrainingFailure
from components.generation.making import ENDING, FAILED, MADE, STOPPING, Made, Maker, Order, arrays, serve, tensors
from components.generation.versions import Versions
from components.settings import OverlapSettings
from components.termination import watch

logger = logging.getLogger(__name__)

KEY = "rl.overlap"
LOOK_S = 0.5
"""How often a process is looked at that is waited for; its pipes may be held open by others."""
CLOSING_S = 5.0
"""What a process has to end by itself."""
LAST_WORDS = 800
"""Characters of what it printed as errors that are shown when it dies."""


class Overlap:
    """Results by number from another process, which is started when the first is asked for."""

    def __init__(self, build: Callable[[], Maker], versions: Versions, settings: OverlapSettings) -> None:
        """`build` makes, in the process, what makes the results; it is sent there."""
        self.build, self.versions, self.settings = build, versions, settings
        self.made: dict[int, Made] = {}
        """What was made and not yet forgotten."""
        self.start_state: dict[str, Tensor] = {}
        """What the first result depends on."""
        self._asked: dict[int, int] = {}  # versions by number
        self._process: _Process | None = None
        self._deaths = 0
        self._threads = torch.get_num_threads()

    def ask(self, number: int, version: int) -> None:
        """Ask for a result; numbers rise, and the version has been written and stays until the result is there."""
        with watch():  # no SIGTERM between what has to happen together
            self._asked[number] = version
            if self._process is None:
                self._start()
            else:
                self._process.order(Order(number, version, None))

    def wait(self, number: int) -> Made:
        """The result.

        Raises InputError where making it does, RuntimeError where that fails in another way, and TrainingFailure when
        the process dies again and again.
        """
        while number not in self.made:
            process = self._process
            assert process is not None and number in self._asked, "only what was asked for can be waited for"
            if problem := process.problem(self.settings.limit_s):
                with watch():
                    self._start_again(problem)
            with suppress(queue.Empty):
                process.bell.get(timeout=LOOK_S)
        return self.made[number]

    def forget(self, below: int) -> None:
        """Let go of the results with smaller numbers."""
        for number in [number for number in self.made if number < below]:
            del self.made[number]
            self._asked.pop(number, None)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        with watch():
            if self._process is not None:
                self._process.end()
                self._process = None
            torch.set_num_threads(self._threads)

    def _start(self) -> None:
        """Start the process, and order what was asked for and is not there."""
        state = self.made[max(self.made)].state if self.made else self.start_state
        self._process = _Process(self._keep)
        threads = self._share_threads()
        self._process.start(self.versions, self.build, threads, self.settings.gpu)
        for place, number in enumerate(number for number in sorted(self._asked) if number not in self.made):
            self._process.order(Order(number, self._asked[number], None if place else arrays(state)))

    def _start_again(self, problem: str) -> None:
        """Another process in place of one with a problem. Raises TrainingFailure when it is one too many."""
        assert self._process is not None
        last_words = self._process.end()
        self._process = None
        if all(number in self.made for number in self._asked):  # its last result came before its end
            return
        self._deaths += 1
        number = min(number for number in self._asked if number not in self.made)
        told = f"the sampler's process {problem} while it made batch {number + 1}"
        if self._deaths > self.settings.restarts:
            raise TrainingFailure(
                f"{told}, death number {self._deaths} in a row; {KEY}.restarts allows {self.settings.restarts}. Its "
                f"last words: {last_words or 'none'}. It holds a copy of the policy beside the reference and the "
                f"scorers: where memory is short, give the step more; or leave {KEY} out, which samples in the process "
                "that trains. Checkpoints written before stay."
            )
        logger.warning("%s; it is started again. Its last words: %s", told, last_words or "none")
        self._start()

    def _share_threads(self) -> int:
        """The threads of the process; where both compute at once, this one goes on with the others."""
        if self.settings.staleness == 0:
            return self.settings.threads or self._threads
        theirs = self.settings.threads or max(1, self._threads // 2)
        torch.set_num_threads(max(1, self._threads - theirs))
        return theirs

    def _keep(self, number: int, made: Made) -> None:
        self.made[number] = made
        self._deaths = 0


class _Process:
    """One process, and the threads that hear it: what it says is kept even if a signal breaks off all waiting."""

    def __init__(self, keep: Callable[[int, Made], None]) -> None:
        self.bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        """Rung for every message, and at the end."""
        self._keep = keep
        self._error: Exception | None = None
        self._context = multiprocessing.get_context("spawn")
        self._link, self._theirs = self._context.Pipe()
        self._errors, self._stderr = self._context.Pipe(duplex=False)
        self._last_words = b""
        self._since = time.monotonic()
        self._process: Any = None
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._hear, self._overhear)]

    def start(self, *given: Any) -> None:
        """Start `serve`, on what it is given; signals to the group pass it by, even before it can say so itself."""
        self._process = self._context.Process(target=serve, args=(self._theirs, self._stderr, *given), name="sampler")
        resource_tracker.ensure_running()  # it would let signals through again
        with _blocked():
            self._process.start()
        self._theirs.close()
        self._stderr.close()
        for thread in self._threads:
            thread.start()

    def order(self, order: Order) -> None:
        """Send an order; one that died will be found out."""
        self._since = time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):
            self._link.send(order)

    def problem(self, limit_s: float) -> str:
        """What is wrong with it; empty while nothing is. Raises what it raised itself."""
        if not self._process.is_alive():
            self._threads[0].join(CLOSING_S)  # everything that it said
        if self._error is not None:
            raise self._error
        if not self._process.is_alive():
            return _ending(self._process.exitcode)
        if time.monotonic() - self._since > limit_s:
            return f"gave no result for {KEY}.limit_s, {limit_s:g} seconds,"
        return ""

    def end(self) -> str:
        """End it; its last words."""
        if self._process is not None and self._process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, ENDING)
            self._process.join(CLOSING_S)
            self._process.kill()
            self._process.join()
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join(CLOSING_S)
        for connection in (self._link, self._errors, self._theirs, self._stderr):
            connection.close()
        return self._last_words.decode(errors="replace").strip()

    def _hear(self) -> None:
        with suppress(EOFError, OSError):
            while self._link in wait([self._link, self._process.sentinel]):
                kind, *told = self._link.recv()
                self._since = time.monotonic()
                self._note(kind, told)
                self.bell.put(None)
        self.bell.put(None)

    def _note(self, kind: str, told: list[Any]) -> None:
        if kind == MADE:
            number, made, metrics, state = told
            self._keep(number, Made(tensors(made), metrics, tensors(state)))
        elif kind == FAILED:
            self._error = RuntimeError(f"the sampler's process failed:\n{told[0]}")
        else:
            self._error = InputError(told[0])

    def _overhear(self) -> None:
        """Pass on what it prints as errors, and remember the end."""
        with suppress(OSError):
            while said := os.read(self._errors.fileno(), 1 << 16):
                os.write(2, said)
                self._last_words = (self._last_words + said)[-LAST_WORDS:]


@contextmanager
def _blocked() -> Iterator[None]:
    """Inside, this thread takes no signal that would stop it, nor does what it starts until it says otherwise."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ending(code: int) -> str:
    """How a process ended, by its exit code."""
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"
