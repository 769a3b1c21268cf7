"""Running a step: plain settings to its settings class, artifacts to paths, numbers to files and tracking.

Kubeflow's components, `python -m components` and the command line's shortcuts all come through here. What
happened is left in `$PLUMBLINE_RUN_DIR/steps/<task>.json` for `plumbline run`, which cannot see into the
step's process otherwise.
"""

import errno
import inspect
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from components import processes, termination, tracking
from components.artifacts import Metrics, read_json, write_json
from components.errors import InputError, TrainingFailure
from components.parsing import parse
from components.ranks import is_first, is_started, world_size
from components.settings import Compute, StepSettings
from components.trainjob import NODES

STEPS = (
    "demo", "preprocess", "base", "validate", "sft", "reward", "rl", "evaluate", "upload", "deploy", "infer",
)  # fmt: skip
RUN_DIR = "PLUMBLINE_RUN_DIR"
FINGERPRINT = "PLUMBLINE_FINGERPRINT"
INPUT_EXIT_CODE = 2
FAILED_EXIT_CODE = 1
EXPECTED = (InputError, TrainingFailure, termination.Terminated)
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def launch(
    step: str, settings: Mapping[str, Any], metrics: Any, task: str, fingerprint: str = "", **artifacts: Any
) -> Metrics:
    """The metrics of a step run inside a Kubeflow task, on the task's artifacts (None where one is absent).

    What needs no traceback ends the process with its message alone, as `ending` says; anything else is raised.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    logging.getLogger("components").setLevel(logging.INFO)
    paths = {name: None if artifact is None else Path(artifact.path) for name, artifact in artifacts.items()}
    os.environ[FINGERPRINT] = fingerprint  # part of what checkpoints are found by
    started = time.monotonic()
    try:
        values = run_step(step, settings, paths, metrics_file=Path(metrics.path), task=task)
    except EXPECTED as error:
        code, line = ending(error, task)
        kind = {INPUT_EXIT_CODE: {"kind": "input"}, FAILED_EXIT_CODE: {"kind": "failure"}}.get(code, {})
        _record(task, started, status="failed" if kind else "stopped", error=str(error), **kind)
        print(line, file=sys.stderr)
        sys.exit(code)
    except Exception as error:
        _record(task, started, status="failed", kind="failure", error=f"{type(error).__name__}: {error}")
        raise
    for name, value in values.items():
        if math.isfinite(value):  # Kubeflow's metadata is JSON, which has no NaN
            metrics.log_metric(name, value)
    _record(task, started, status="succeeded", metrics=values)
    return values


def sourced_fingerprints(
    settings: Mapping[str, Mapping[str, Any]], code: Mapping[str, object], demo: bool
) -> tuple[str, ...]:
    """For each task's settings a digest over its code and what it reads from outside; for a Kubeflow task.

    A source that is not there ends the process with its message alone.
    """
    from components.sources import sourced_fingerprint

    try:
        return tuple(
            sourced_fingerprint(task, parse(settings_class(task), values, prefix=(task,)), str(code[task]), demo)
            for task, values in settings.items()
        )
    except InputError as error:
        exit_code, line = ending(error, "sources")
        print(line, file=sys.stderr)
        sys.exit(exit_code)


def ending(error: BaseException, task: str) -> tuple[int, str]:
    """The exit code and the one line for an end that needs no traceback, one of EXPECTED.

    2 for a mistake that a person can fix, 1 for training that cannot go on, 143 for SIGTERM.
    """
    match error:
        case InputError():
            return INPUT_EXIT_CODE, f"error: {error}"
        case TrainingFailure():
            return FAILED_EXIT_CODE, f"error: {task}: {error}"
    return termination.EXIT_CODE, f"{task}: {error}"


def run_step(
    step: str, settings: Mapping[str, Any], paths: Mapping[str, Path | None], *, metrics_file: Path, task: str
) -> Metrics:
    """The metrics of a step run on local paths; also written to `metrics_file`, with metrics.jsonl beside it.

    Where its settings ask for several processes, or its environment for pods of its own, this one starts them and
    watches: it tracks nothing. Raises InputError for settings that do not fit the step and for a full or unwritable
    disk, Terminated after SIGTERM, and whatever the step raises.
    """
    # Threads that wait for work spin a little, not for milliseconds: on shared cores that costs a third of the speed.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    parsed = parse(settings_class(step), settings, prefix=(task,))
    compute = compute_of(parsed)
    size = compute.nodes * compute.processes if compute else 1
    if compute and (size > 1 or _in_pods(compute)) and not is_started():
        _start(processes.Job(step, dict(settings), dict(paths), metrics_file, task), compute)
        return {name: float(value) for name, value in read_json(metrics_file).items()}
    if is_started() and world_size() != size:
        raise InputError(
            f"{task}: {world_size()} processes were started, and its compute settings ask for {size}. Start as "
            "many as they say; a step starts its own where nothing else does."
        )
    run = step_function(step)
    try:
        with (
            termination.watch() as watch,
            watch.interruptible(),
            tracking.track(task, parsed.model_dump(mode="json"), metrics_file.parent) as tracker,
        ):
            values = {name: float(value) for name, value in run(parsed, **paths).items()}
            tracker.finish(values)
        if is_first():
            write_json(metrics_file, values)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise InputError(
            f"{error.filename or metrics_file.parent}: {error.strerror}. Make room or allow writing there, then start "
            "the same command again; it continues from a checkpoint where there is one."
        ) from error
    return values


def compute_of(settings: StepSettings) -> Compute | None:
    """How a step computes; None for one that cannot divide its work."""
    return getattr(settings, "compute", None) or getattr(getattr(settings, "training", None), "compute", None)


def _in_pods(compute: Compute) -> bool:
    """Whether the processes are those of a TrainJob: its environment says what its pods are, also where it is one."""
    return compute.nodes > 1 or NODES in os.environ


def _start(job: processes.Job, compute: Compute) -> None:
    """Run the job in processes of this container, or on several machines."""
    if not _in_pods(compute):
        processes.run(job, compute.processes)
        return
    from components import trainer

    trainer.run(job, compute.nodes, compute.processes)


def settings_class(step: str) -> type[StepSettings]:
    """The one settings class of a step."""
    module = import_module(f"components.{step}.settings")
    (found,) = {
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, StepSettings) and value.__module__ == module.__name__
    }
    return found


def step_function(step: str) -> Callable[..., Metrics]:
    """The step's `run`. Raises InputError for a name that is no step's."""
    if step not in STEPS:
        raise InputError(f"{step!r} is not a step; accepted: {', '.join(STEPS)}.")
    run: Callable[..., Metrics] = import_module(f"components.{step}.step").run
    return run


def path_parameters(run: Callable[..., Any]) -> dict[str, bool]:
    """The names of a step's paths in order, and whether each may be left out; the last one is its output."""
    signature = inspect.signature(run, eval_str=True)
    return {
        name: parameter.annotation == Path | None
        for name, parameter in signature.parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def one_of_several() -> int:
    """Run this process's part of the job in the environment; how it ended is left for who started it, and the code."""
    job = processes.Job.read(os.environ[processes.JOB])
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    logging.getLogger("components").setLevel(logging.INFO if is_first() else logging.WARNING)
    if not job.exchange:  # else who started it is on another machine
        processes.enter()
    try:
        from components.exchange import visiting

        with visiting(job) as here:
            run_step(here.step, here.settings, here.paths, metrics_file=here.metrics_file, task=here.task)
    except EXPECTED as error:
        processes.leave(error)
        return ending(error, job.task)[0]
    except Exception as error:
        traceback.print_exc()
        processes.leave(error)
        return FAILED_EXIT_CODE
    processes.leave(None)
    return 0


def _record(task: str, started: float, **fields: Any) -> None:
    """Leave what happened for the process that watches this one."""
    if folder := os.environ.get(RUN_DIR):
        write_json(Path(folder) / "steps" / f"{task}.json", {**fields, "seconds": time.monotonic() - started})


if __name__ == "__main__":  # torchrun's way in
    sys.exit(one_of_several())
