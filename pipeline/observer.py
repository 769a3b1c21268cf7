"""Watching kfp.local at work: what it starts or takes from the cache, what steps print, how they end.

kfp.local has no hooks, so three of its functions are replaced while a run lasts; the third, which starts a task's
command, is the runner's. A failing task also ends the run at once; kfp would go on with the tasks that do not
depend on it.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from kfp.local import status, task_dispatcher
from kfp.local.orchestrator import task_executor

GRACE_S = 30.0
"""What a task has after SIGTERM to finish its update and write a checkpoint; a pod has as long by default."""


@dataclass(frozen=True)
class Ending:
    """How a task ended: where its outputs are, and whether it ran at all."""

    task: str
    succeeded: bool
    cached: bool
    seconds: float
    exit_code: int
    folder: Path


class Observer(Protocol):
    """What wants to know."""

    def started(self, task: str) -> None:
        """A task's process is about to start; not called for a cached task."""

    def printed(self, task: str, line: str) -> None:
        """A task's process wrote a line, its newline included."""

    def ended(self, ending: Ending) -> None:
        """A task ended or was taken from the cache."""

    def stands(self, task: str, folder: Path) -> bool:
        """Whether the cached outcome of a task may be believed; if not, the task runs."""


@dataclass(frozen=True)
class Start:
    """A task whose command is about to run."""

    task: str
    environment: Mapping[str, str]
    """What the command sees besides our own variables."""
    printed: Callable[[str], None]
    """To be told every line that it writes, the newline included."""


class Runner(Protocol):
    """Where the commands of tasks run."""

    kfp: Any
    """kfp's runner of that kind."""
    replaces: tuple[ModuleType, str]
    """The function of kfp's that `start` is called in place of."""

    def start(self, start: Start, *arguments: Any, **named: Any) -> int:
        """Run a task's command to its end and give its exit code; the arguments are those of kfp's function.

        An exception, such as Ctrl-C, ends the command and goes on.
        """


class StepFailed(Exception):
    """Ends the run at its first failing task."""


@contextmanager
def observed(observer: Observer, runner: Runner, environment: Mapping[str, str]) -> Iterator[None]:
    """Report every task of kfp.local to `observer`; steps see `environment` besides ours.

    Raises StepFailed out of the pipeline when a task fails.
    """
    watch = _Watch(observer, runner, environment)
    with ExitStack() as stack:
        for module, name, replacement in (
            (task_executor, "execute_single_task", watch.execute),
            (task_dispatcher, "run_single_task_implementation", watch.run),
            (*runner.replaces, watch.start),
        ):
            stack.enter_context(_replaced(module, name, replacement))
        yield


class _Watch:
    """The three replacements, and what they tell each other about the task at hand."""

    def __init__(self, observer: Observer, runner: Runner, environment: Mapping[str, str]) -> None:
        self.observer, self.runner, self.environment = observer, runner, environment
        self.task, self.ran, self.exit_code = "", False, 0
        self._execute = task_executor.execute_single_task
        self._run = task_dispatcher.run_single_task_implementation

    def execute(self, *, task_name: str, task_spec: Any, **rest: Any) -> Any:
        """In place of kfp's: a task, from the cache or not."""
        self.task = task_spec.task_info.name or task_name
        self.ran, self.exit_code, started = False, 0, time.monotonic()
        outputs, result = self._execute(task_name=task_name, task_spec=task_spec, **rest)
        if not self.ran and not self.observer.stands(self.task, _folder(outputs) or Path()):
            task_spec.caching_options.enable_cache = False
            outputs, result = self._execute(task_name=task_name, task_spec=task_spec, **rest)
        succeeded = result == status.Status.SUCCESS
        folder = _folder(outputs) or _planned_folder(task_spec, **rest)
        seconds = time.monotonic() - started
        self.observer.ended(Ending(self.task, succeeded, not self.ran, seconds, self.exit_code, folder))
        if not succeeded:
            raise StepFailed(self.task)
        return outputs, result

    def run(self, **arguments: Any) -> Any:
        """In place of kfp's: a task that is not in the cache."""
        self.ran = True
        self.observer.started(self.task)
        return self._run(**arguments)

    def start(self, *arguments: Any, **named: Any) -> int:
        """In place of kfp's: a task's command."""
        task = self.task
        start = Start(task, self.environment, lambda line: self.observer.printed(task, line))
        self.exit_code = self.runner.start(start, *arguments, **named)
        return self.exit_code


def _folder(outputs: Mapping[str, Any]) -> Path | None:
    """The folder that holds a task's outputs; None when it gave none."""
    for output in outputs.values():
        if uri := getattr(output, "uri", ""):
            return Path(uri).parent
    return None


def _planned_folder(task_spec: Any, *, pipeline_root: str, pipeline_resource_name: str, **_: Any) -> Path:
    """The folder where kfp lets a task write."""
    component = str(task_spec.component_ref.name)
    return Path(pipeline_root) / pipeline_resource_name / component.removeprefix("comp-")


@contextmanager
def _replaced(module: ModuleType, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, original)
