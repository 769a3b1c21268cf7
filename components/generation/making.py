"""What the process that works ahead does: results by number, until nobody wants more or its parent is gone.

It ends with its parent, however that ends and whatever it is doing itself. What a terminal or a cluster sends to the
whole group of processes (SIGINT, SIGTERM) is its parent's business.
"""

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from components.artifacts import Metrics
from components.errors import InputError
from components.generation.versions import Versions

STOPPING = (signal.SIGINT, signal.SIGTERM)
ENDING = signal.SIGUSR1
"""What its parent ends it with, in order: what is killed leaves semaphores behind."""
PARENT_CHECK_S = 1.0
"""A process that its parent forked may keep the parent's pipes open: then it is missed after so long."""
MADE, REFUSED, FAILED = "made", "refused", "failed"
"""The kinds of messages: a result, an InputError's message, the traceback of anything else."""
Arrays = dict[str, Any]
"""Tensors by name as numpy's arrays: torch would hand tensors over by way of a server in the process that made them."""


@dataclass(frozen=True)
class Made:
    """A result."""

    tensors: dict[str, Tensor]
    """On the CPU."""
    metrics: Metrics
    state: dict[str, Tensor]
    """What the next result depends on."""


class Maker(Protocol):
    """What makes results, each with the weights that it is given for it."""

    weights: Sequence[Tensor]
    """What the weights are copied to."""

    def make(self, number: int) -> tuple[dict[str, Tensor], Metrics]:
        """Result `number`."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What later results depend on, besides their numbers and weights."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        ...


class Order(NamedTuple):
    """A result that is wanted."""

    number: int
    version: int
    """Of the weights that it is made with."""
    state: Arrays | None
    """What to go on from; None where that is the result before."""


def serve(
    link: Connection, errors: Connection, versions: Versions, build: Callable[[], Maker], threads: int, gpu: int | None
) -> None:
    """Make what is ordered over `link`, one result after the other; what is printed as an error goes to `errors`."""
    os.dup2(errors.fileno(), 2)
    for number in STOPPING:
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which everything that is started here would inherit
    signal.signal(ENDING, lambda *_: sys.exit())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(threads)
    try:
        _take_gpu(gpu)
        _make(link, versions, build())
    except InputError as error:
        _send(link, REFUSED, str(error))
    except Exception:
        _send(link, FAILED, traceback.format_exc())


def _make(link: Connection, versions: Versions, maker: Maker) -> None:
    loaded, since = None, time.monotonic()
    while (order := _ordered(link)) is not None:
        idle_s = time.monotonic() - since
        if order.version != loaded:
            versions.read(order.version, maker.weights)
            loaded = order.version
        if order.state is not None:
            maker.restore(tensors(order.state))
        made, metrics = maker.make(order.number)
        metrics = metrics | {"perf/idle_s": idle_s}
        _send(link, MADE, order.number, arrays(made), metrics, arrays(maker.state()))
        since = time.monotonic()


def _ordered(link: Connection) -> Order | None:
    """The next order; None when nobody wants more."""
    try:
        order: Order = link.recv()
    except (EOFError, ConnectionResetError):
        return None
    return order


def _send(link: Connection, *message: Any) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # nobody wants it
        link.send(message)


def _take_gpu(number: int | None) -> None:
    """Compute on GPU `number`; if none is named on the second, or the one there is. Raises InputError for none such."""
    there = torch.cuda.device_count()
    if number is not None and number >= there:
        raise InputError(
            f"rl.overlap.gpu is {number}; accepted: below {there}, which is how many GPUs there are. Leave it out to "
            "have one taken, or none where there is none."
        )
    if there:
        torch.cuda.set_device(min(1, there - 1) if number is None else number)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    while not wait([parent.sentinel], PARENT_CHECK_S) and os.getppid() == parent.pid:
        pass
    os._exit(1)


def arrays(given: dict[str, Tensor]) -> Arrays:
    """Tensors as arrays."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in given.items()}


def tensors(given: Arrays) -> dict[str, Tensor]:
    """Arrays as tensors."""
    return {name: torch.from_numpy(array) for name, array in given.items()}
