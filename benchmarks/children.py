"""The processes that benchmarks measure in: started one at a time, none left behind."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

HERE = Path(__file__).parent
STOPPING = (signal.SIGINT, signal.SIGTERM)


class Held:
    """SIGINT and SIGTERM from now on, until they are released."""

    def __init__(self) -> None:
        self._came = False
        self._handlers = {number: signal.signal(number, self._note) for number in STOPPING}

    def release(self) -> None:
        """Put the handlers back. Raises KeyboardInterrupt where one of the signals has come."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._came:
            raise KeyboardInterrupt

    def _note(self, *_: Any) -> None:
        self._came = True


@dataclass(frozen=True)
class Children:
    """Starts the scripts beside this file, one at a time, and leaves none behind."""

    threads: int
    log: IO[str]
    """Where they write their errors."""
    device: str = "cpu"
    """cpu hides every GPU from them."""

    def run(self, script: str, *arguments: object, limit_s: float | None = None) -> tuple[int, str]:
        """Exit code and output; a child is killed, and all that it started, when this process is to stop.

        Raises subprocess.TimeoutExpired for a child that was killed after `limit_s` seconds.
        """
        variables = {
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONPATH": str(HERE.parent),  # the code beside this file, whatever is installed
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        } | ({"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {})
        command = [sys.executable, str(HERE / script), *map(str, arguments)]
        held = Held()  # a signal that came before the child is known could not kill it
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=os.environ | variables,
            start_new_session=True,
        )  # fmt: skip
        try:
            held.release()
            output, _ = child.communicate(timeout=limit_s)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        return child.returncode, output

    def last_words(self) -> str:
        """The last line that was written to the log."""
        lines = [line for line in Path(self.log.name).read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else "it said nothing"


@contextmanager
def nursery(threads: int, device: str = "cpu") -> Iterator[tuple[Path, Children]]:
    """A scratch folder and what starts children; SIGTERM ends the block as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory(prefix="plumbline-bench-") as scratch, Path(scratch, "log.txt").open("w") as log:
        yield Path(scratch), Children(threads, log, device)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt
