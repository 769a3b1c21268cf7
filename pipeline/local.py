"""`plumbline run`: the same pipeline object, run on this machine by kfp.local.

A run has a folder (`runs.py`). The outputs of its tasks and the cache lie beside the runs, in
`<runs>/.artifacts` and `<runs>/.cache`, so that they outlive a run that is deleted. The cache is keyed by a
task's settings, inputs and fingerprint.
"""

import contextlib
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from kfp import local
from kfp.local import config

from components import termination, webhook
from components.artifacts import write_json
from components.errors import InputError
from components.launch import FAILED_EXIT_CODE, INPUT_EXIT_CODE, RUN_DIR
from components.mlflow_server import ADDRESS
from components.trainjob import CHECKPOINTS
from pipeline.documents import write_document
from pipeline.ledger import Ledger
from pipeline.observer import Ending, Runner, StepFailed, observed
from pipeline.processes import Processes
from pipeline.promotion import stands
from pipeline.runs import RunFolder, shown
from pipeline.screen import Screen
from pipeline.summary import Result, read_alerts, read_metrics, status_of, summarize
from pipeline.surroundings import environment

INTERRUPTED_EXIT_CODE = 130
STOPPED = "stopped"
TAIL_LINES = 20
KILLED, TERMINATED = ((-number, 128 + number) for number in (signal.SIGKILL, signal.SIGTERM))
"""The codes of a process that died of a signal, and of the shell that ran it."""


@dataclass(frozen=True)
class Plan:
    """What to run, apart from where."""

    pipeline: Any
    """The Kubeflow pipeline."""
    name: str
    """The MLflow experiment."""
    tasks: Sequence[str]
    """The display names of its tasks, in order."""
    settings: Mapping[str, Any]
    """What is written to settings.yaml and logged."""


def run(plan: Plan, runs_dir: Path, screen: Screen, runner: Runner | None = None) -> int:
    """Run the plan to its end, its tasks where `runner` runs them (without one, as processes); the exit code.

    0 when it succeeded or the gate rejected the candidate, 1 when a step failed, 2 when the reason is a
    person's to fix, 130 when it was interrupted, 143 when SIGTERM stopped it or its step. summary.json is
    written in every case.
    """
    runs_dir = runs_dir.absolute()
    folder = RunFolder.create(runs_dir)
    (folder.path / "settings.yaml").write_text(write_document(dict(plan.settings)), encoding="utf-8")
    screen.line(f"run {folder.run_id}   log: {shown(folder.log)}")
    ledger = Ledger(runs_dir, screen.line)
    with (
        folder.log.open("w", encoding="utf-8", buffering=1) as log,
        tempfile.TemporaryDirectory(prefix="plumbline-") as scratch,
        termination.watch() as watch,
        environment(
            {
                ADDRESS: ledger.address,
                RUN_DIR: str(folder.path),
                CHECKPOINTS: plan.settings.get("checkpoints") or str(runs_dir / ".checkpoints"),
                "TMPDIR": scratch,
            }
        ),
    ):
        attempt = _Attempt(folder, ledger, screen, log, runner or Processes())
        try:
            attempt.execute(plan, runs_dir, watch)
        finally:
            screen.stopped()
            summary = attempt.sum_up(plan.tasks)
            ledger.close(folder, summary["status"])
    attempt.say_goodbye(summary, plan.tasks)
    message = {"run": folder.run_id, "status": summary["status"], "error": attempt.error, "pipeline": plan.name}
    if trouble := webhook.send(message):
        screen.line(f"warning: {trouble}")
    return attempt.exit_code


class _Attempt:
    """One go at a pipeline: observes its tasks, keeps how they ended, and sums up."""

    def __init__(self, folder: RunFolder, ledger: Ledger, screen: Screen, log: TextIO, runner: Runner) -> None:
        self.folder, self.ledger, self.screen, self.log, self.runner = folder, ledger, screen, log, runner
        self.results: dict[str, Result] = {}
        self.running = ""
        self.error = ""
        self.exit_code = 0
        self.started_at = self.task_started_at = time.monotonic()

    def execute(self, plan: Plan, runs_dir: Path, watch: termination.Watch) -> None:
        """Run the plan; every way in which it can end becomes an exit code."""
        try:
            with watch.interruptible():
                self.ledger.open(plan.name, self.folder, plan.settings)
                self._hand_over(plan.pipeline, runs_dir)
        except StepFailed as failed:
            result = self.results[str(failed)]
            self.error = result.error if result.fixable else f"step {result.task} failed: {result.error}"
            self.exit_code = INPUT_EXIT_CODE if result.fixable else FAILED_EXIT_CODE
            if self.folder.recorded(result.task).get("status") == STOPPED:
                self.running, self.error, self.exit_code = result.task, result.error, termination.EXIT_CODE
        except termination.Terminated:
            self.error = "stopped by SIGTERM"
            self.exit_code = termination.EXIT_CODE
        except KeyboardInterrupt:
            self.error = "interrupted"
            self.exit_code = INTERRUPTED_EXIT_CODE
        except InputError as error:  # before the first step: each step is a process of its own
            self.error = str(error)
            self.exit_code = INPUT_EXIT_CODE
        except Exception as error:  # of kfp or ours: the log has the traceback
            traceback.print_exc(file=self.log)
            self.error = f"{type(error).__name__}: {error}"
            self.exit_code = FAILED_EXIT_CODE

    def _hand_over(self, pipeline: Any, runs_dir: Path) -> None:
        """Give the pipeline to kfp.local; what kfp prints goes to the log."""
        with (
            contextlib.redirect_stdout(self.log),
            warnings.catch_warnings(),
            observed(self, self.runner, {**self.ledger.environment(), "PYTHONUNBUFFERED": "1"}),
        ):
            warnings.simplefilter("ignore")  # kfp warns of every setting that has no effect here
            local.init(
                runner=self.runner.kfp,
                pipeline_root=str(runs_dir / ".artifacts"),
                enable_caching=True,
                cache_root=str(runs_dir / ".cache"),
            )
            try:
                pipeline()
            finally:
                config.LocalExecutionConfig.instance = None

    def started(self, task: str) -> None:
        """A task's process is about to start."""
        self.running, self.task_started_at = task, time.monotonic()
        self.log.write(f"=== {task}\n")
        self.screen.started(task)

    def printed(self, task: str, line: str) -> None:
        """A task's process wrote a line."""
        self.log.write(line)
        self.screen.printed(task, line)

    def ended(self, ending: Ending) -> None:
        """A task ended or was taken from the cache."""
        self.running = ""
        result = self._succeeded(ending) if ending.succeeded else self._failed(ending)
        self.results[ending.task] = result
        self.folder.link(ending.task, ending.folder)
        self.screen.ended(result)

    def stands(self, task: str, folder: Path) -> bool:
        """Whether what a cached task did outside its folder is still so."""
        return stands(task, folder)

    def _succeeded(self, ending: Ending) -> Result:
        """The result of a task that gave its outputs, now or when it was cached."""
        metrics, alerts = read_metrics(ending.folder), read_alerts(ending.folder)
        if not ending.cached:
            return Result(ending.task, "succeeded", ending.seconds, metrics, ending.folder, alerts=alerts)
        result = Result(ending.task, "cached", ending.seconds, metrics, ending.folder, alerts=alerts)
        self.folder.record(ending.task, status="cached", metrics=metrics, seconds=ending.seconds)
        self.ledger.cached(result)
        return result

    def _failed(self, ending: Ending) -> Result:
        """The result of a failed task: what its process recorded, or what its exit code says."""
        recorded = self.folder.recorded(ending.task)
        error = recorded.get("error") or _exit_text(ending.exit_code)
        if not recorded:
            status = STOPPED if ending.exit_code in TERMINATED else "failed"
            self.folder.record(ending.task, status=status, kind="failure", error=error, seconds=ending.seconds)
        fixable = recorded.get("kind") == "input"
        alerts = read_alerts(ending.folder)
        return Result(ending.task, "failed", ending.seconds, {}, ending.folder, error, fixable, alerts)

    def sum_up(self, tasks: Sequence[str]) -> dict[str, Any]:
        """Write summary.json and give it back."""
        now = time.monotonic()
        if self.running and self.running not in self.results:  # interrupted, or kfp itself failed
            seconds = now - self.task_started_at
            self.results[self.running] = Result(self.running, "failed", seconds, error=self.error)
            if not self.folder.recorded(self.running):  # a step that was stopped has done so itself
                self.folder.record(self.running, status="failed", kind="failure", error=self.error, seconds=seconds)
        status = status_of(self.results, failed=self.exit_code != 0)
        summary = summarize(self.folder.run_id, status, now - self.started_at, tasks, self.results)
        write_json(self.folder.summary, summary)
        return summary

    def say_goodbye(self, summary: Mapping[str, Any], tasks: Sequence[str]) -> None:
        """The table, where to look, and an error last."""
        results = [self.results.get(task, Result(task, "skipped")) for task in tasks]
        self.screen.table(summary["status"], summary["seconds"], results)
        output = self.folder.output
        self.screen.paths(
            {
                "report": output("evaluate", "report/report.html") or output("validate", "report/report.html"),
                "rl": output("rl", "report/report.html"),
                "model": summary["model_dir"] or output("rl", "model"),
                "MLflow": self.ledger.place(),
                "summary": shown(self.folder.summary),
            }
        )
        if self.exit_code in (INTERRUPTED_EXIT_CODE, termination.EXIT_CODE):
            step = f"step {self.running}" if self.running else "where it stopped"
            word = "interrupted" if self.exit_code == INTERRUPTED_EXIT_CODE else STOPPED
            _complain(f"{word}: the same command continues from {step}; the steps before it are cached.")
        elif self.exit_code == FAILED_EXIT_CODE:
            _complain(f"\n{self.folder.tail(TAIL_LINES)}\n\nerror: {self.error}")
        elif self.exit_code:
            _complain(f"error: {self.error}")


def _complain(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr)


def _exit_text(code: int) -> str:
    """What an exit code says about a process that recorded nothing."""
    if code in KILLED:
        return "its process was killed, most likely for want of memory"
    if code in TERMINATED:
        return "stopped by SIGTERM"
    return f"its process ended with code {code}"
