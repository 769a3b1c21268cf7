"""The tasks of a run as processes of this machine."""

import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress

from kfp import local
from kfp.local import subprocess_task_handler

from pipeline.observer import GRACE_S, Start


class Processes:
    """Runs the commands of tasks as processes, with the interpreter and the packages of this one."""

    equip = None
    """Nothing is put on the tasks."""
    replaces = (subprocess_task_handler, "run_local_subprocess")

    def __init__(self) -> None:
        self.kfp = local.SubprocessRunner(use_venv=False)

    def start(self, start: Start, full_command: list[str], env_vars: Mapping[str, str] | None = None) -> int:
        """Run the command to its end, in a group of processes of its own so that all of it can be ended."""
        process = subprocess.Popen(
            full_command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **start.environment, **(env_vars or {})},
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                start.printed(line)
            return process.wait()
        except BaseException:
            _end(process, start)
            raise


def _end(process: "subprocess.Popen[str]", start: Start) -> None:
    """Ask the process and its children to end; make them after GRACE_S, or when a person asks once more."""
    assert process.stdout is not None
    timer = threading.Timer(GRACE_S, _kill, (process.pid,))
    timer.start()
    try:
        os.killpg(process.pid, signal.SIGTERM)
        for line in process.stdout:
            start.printed(line)
        process.wait()
    except ProcessLookupError:
        pass
    finally:
        timer.cancel()
        _kill(process.pid)
        process.wait()


def _kill(group: int) -> None:
    """Kill what is left of a group of processes."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
