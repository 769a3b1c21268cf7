"""Supervised training: epochs over rows in batches of like length, with evaluations and checkpoints.

Killed at any time and started again, it ends with the weights and the history of metrics that it would have had
anyway.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from components import termination, tracking
from components.artifacts import Metrics
from components.batches import token_batches
from components.checkpoints import Checkpoints
from components.progress import Progress
from components.randomness import random_states, set_random_states
from components.settings import Training
from components.updates import Updater, total

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch: a sum over terms, and sums of what is worth logging, per term."""

    total: Tensor
    sums: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """What supervised training needs to know of a task."""

    def length(self, row: Any) -> int:
        """Tokens that a row costs."""
        ...

    def terms(self, row: Any) -> int:
        """Terms that a row adds to the loss."""
        ...

    def loss(self, model: nn.Module, rows: Sequence[Any]) -> Loss:
        """The summed loss of some rows."""
        ...


def fit(
    model: nn.Module,
    objective: Objective,
    rows: Sequence[Any],
    settings: Training,
    *,
    seed: int,
    label: str,
    evaluate: Callable[[], Metrics],
    checkpoints: Checkpoints,
    prefix: str = "",
) -> Metrics:
    """Train `model` on `rows`; returns the last evaluation and the training metrics.

    `prefix` stands before the names of the metrics that are tracked, where one step trains several models.

    Continues from the newest checkpoint where there is one. The order of the rows depends on the seed alone. The
    checkpoints stay until the caller has saved the model and clears them. Raises Terminated after SIGTERM, once the
    update at hand is done and in a checkpoint, and TrainingFailure as `Updater.step` does.
    """
    plan = list(_plan(objective, rows, settings, seed))
    updater = Updater(model, settings.optimizer, settings.compute, len(plan))
    with termination.watch() as watch:
        course = _Course(label, updater, settings.eval_every, evaluate, checkpoints, watch, prefix)
        course.resume()
        for batches in plan[updater.update :]:
            course.finish(_update(updater, objective, [[rows[i] for i in batch] for batch in batches]))
    model.eval()
    return course.last() if course.history else evaluate()


class _Course:
    """Where training stands: what is done of it, and what each update leaves behind."""

    def __init__(
        self,
        label: str,
        updater: Updater,
        eval_every: int,
        evaluate: Callable[[], Metrics],
        checkpoints: Checkpoints,
        watch: termination.Watch,
        prefix: str,
    ) -> None:
        self.label, self.updater, self.eval_every, self.evaluate = label, updater, eval_every, evaluate
        self.checkpoints, self.watch, self.prefix = checkpoints, watch, prefix
        self.history: list[tracking.Row] = []
        self.progress = Progress(label, updater.total_updates)

    def resume(self) -> None:
        """Take back the newest checkpoint, and finish the update whose evaluation was broken off."""
        checkpoint = self.checkpoints.latest()
        if checkpoint is None:
            return
        self.updater.restore(checkpoint.tensors, checkpoint.values["updater"], checkpoint.source)
        self.history = [tracking.Row(*row) for row in checkpoint.values["history"]]
        tracking.replay(self.history)
        self.progress.done = len(self.history)
        logger.info("%s continues from update %d of %d", self.label, self.updater.update, self.updater.total_updates)
        if checkpoint.values["unfinished"] is not None:
            self.finish(checkpoint.values["unfinished"])

    def last(self) -> Metrics:
        """The numbers of the last update."""
        return {name.removeprefix(self.prefix): value for name, value in self.history[-1].metrics.items()}

    def finish(self, metrics: Metrics) -> None:
        """Evaluate where it is time, log, and write a checkpoint where it is time or the step is to stop."""
        update = self.updater.update
        if update == self.updater.total_updates or (self.eval_every and update % self.eval_every == 0):
            metrics = metrics | self._evaluated(metrics)
        self.history.append(tracking.log_metrics({self.prefix + name: metrics[name] for name in metrics}, update))
        self.progress.advance(loss=metrics["loss/train"])
        if self.checkpoints.due(update) or self.watch.requested:
            self._save(None)
        self.watch.check()

    def _evaluated(self, metrics: Metrics) -> Metrics:
        """The evaluation; broken off by SIGTERM, it is done again when training continues."""
        before = random_states()
        try:
            with self.watch.interruptible():
                return self.evaluate()
        except termination.Terminated:
            set_random_states(before)
            self._save(metrics)
            raise

    def _save(self, unfinished: Metrics | None) -> None:
        """A checkpoint; `unfinished` is what the last update measured, where its evaluation is still to come."""
        values = {"updater": self.updater.values(), "history": self.history, "unfinished": unfinished}
        self.checkpoints.save(self.updater.update, self.updater.state(), values)


def _plan(objective: Objective, rows: Sequence[Any], settings: Training, seed: int) -> Iterator[list[list[int]]]:
    """The micro-batches of every update of every epoch."""
    lengths = [objective.length(row) for row in rows]
    for epoch in range(settings.epochs):
        batches = token_batches(lengths, settings.batch_tokens, seed + 1000 * epoch)
        for start in range(0, len(batches), settings.accumulation):
            yield batches[start : start + settings.accumulation]


def _update(updater: Updater, objective: Objective, micro_batches: Sequence[Sequence[Any]]) -> Metrics:
    """One optimiser step over some micro-batches."""
    updater.model.train()
    every_row = [row for rows in micro_batches for row in rows]
    own_terms = sum(map(objective.terms, every_row))
    updater.count(samples=len(every_row), tokens=sum(map(objective.length, every_row)))
    terms = float(total(torch.tensor(float(own_terms))))
    sums: Metrics = {}
    for number, rows in enumerate(micro_batches, start=1):
        loss = objective.loss(updater.model, rows)
        updater.backward(loss.total, terms, last=number == len(micro_batches))
        for name, value in {"loss/train": loss.total.item(), **loss.sums}.items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: value / own_terms for name, value in sums.items()} | updater.step()
