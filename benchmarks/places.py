"""What the process of a started step does, and where it stands, shown in shared memory while it runs."""

import os
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TextIO
from unittest.mock import patch

PHASES = ("outside", "sampling", "learning", "saving", "ending")
OUTSIDE, SAMPLING, LEARNING, SAVING, ENDING = PHASES
"""Before and after training; making a batch; learning from it; writing a checkpoint; saving what was learned."""


class Place(NamedTuple):
    """Where a start stands."""

    phase: str
    batch: int
    """The batch (0-based) that it made last; for rl."""
    batch_updates: int
    """Updates that it took on that batch."""
    updates: int
    """Updates that it took altogether."""


def follow(
    shown: Any,
    folder: Path,
    environment: Mapping[str, str],
    step: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path],
    task: str,
) -> None:
    """What the process of a start does: the step, which shows where it stands.

    The report of rl, which takes longer than all else on tiny models, is left out.
    """
    from components.launch import launch
    from components.rl import step as rl

    os.environ.update(environment)
    with (folder / "log.txt").open("w", buffering=1) as log:
        _print_to(log)
        _show(shown)
        artifacts: dict[str, Any] = {name: SimpleNamespace(path=str(path)) for name, path in inputs.items()}
        artifacts["model"] = SimpleNamespace(path=str(folder / "model"))
        metrics = SimpleNamespace(path=str(folder / "metrics"), log_metric=lambda *_: None)
        with patch.object(rl, "write_report"):
            launch(step, settings, metrics=metrics, task=task or step, **artifacts)


def _print_to(log: TextIO) -> None:
    """Everything that this process prints goes to `log`, what libraries in C print too."""
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    sys.stdout = sys.stderr = log


def _show(shown: Any) -> None:
    """Make the training in this process show where it stands: phase, batch, updates on it and altogether."""
    from components.checkpoints import Checkpoints
    from components.rl import step as rl
    from components.rl.pairs import PairSource
    from components.rl.rollout import RolloutSource
    from components.updates import Updater

    def within(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def shows(*args: Any, **fields: Any) -> Any:
            before = shown[0]
            if phase == SAMPLING:
                shown[1], shown[2] = args[1], 0  # the batch's number
            shown[0] = PHASES.index(phase)
            result = function(*args, **fields)
            shown[0] = before
            return result

        return shows

    def counted(take_step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(take_step)
        def shows(updater: Updater) -> Any:
            result = take_step(updater)
            shown[2], shown[3] = shown[2] + 1, shown[3] + 1
            return result

        return shows

    places = [(rl, "train", LEARNING), (Checkpoints, "save", SAVING), (rl, "save_model", ENDING)]
    for owner, name, phase in (*places, (RolloutSource, "batch", SAMPLING), (PairSource, "batch", SAMPLING)):
        setattr(owner, name, within(phase, getattr(owner, name)))
    Updater.step = counted(Updater.step)  # type: ignore[method-assign]


def place(shown: Any) -> Place:
    """What is shown."""
    phase, *numbers = shown
    return Place(PHASES[phase], *numbers)
