"""The one thread that decodes, and how its results reach the event loop."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
Cancelled = Callable[[], bool]

LOOK_S = 0.25
"""How often a waiting request is asked whether its client is still there."""


class End(Generic[T]):
    """Nothing more comes; `error` says why when something went wrong."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error


class Worker:
    """Runs one job after another; jobs wait in the order they came."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoder")
        self._closing = threading.Event()

    async def stream(
        self, job: Callable[[Cancelled], Iterator[T]], gone: Callable[[], Awaitable[bool]]
    ) -> AsyncIterator[T]:
        """What the job yields, as it comes; cancelled when `gone` says so or nobody iterates any more.

        Raises what the job raises.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[T | End[T]]()
        leave = threading.Event()

        def put(item: T | End[T]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, item)

        def work() -> None:
            try:
                for item in job(lambda: leave.is_set() or self._closing.is_set()):
                    put(item)
                put(End())
            except Exception as error:
                put(End(error))

        waiting = self._executor.submit(work)
        try:
            while not await gone():
                try:
                    item = await asyncio.wait_for(queue.get(), LOOK_S)
                except TimeoutError:
                    continue
                if isinstance(item, End):
                    if item.error is not None:
                        raise item.error
                    return
                yield item
        finally:
            leave.set()
            waiting.cancel()

    def close(self) -> None:
        """Cancel what is decoding or waiting."""
        self._closing.set()
        self._executor.shutdown(wait=False, cancel_futures=True)
