"""Supervised training: epochs over rows in batches of like length, with evaluations and checkpoints.

Killed at any time and started again, it ends with the weights and the history of metrics that it would have had
anyway.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from components import termination, tracking
from components.artifacts import Metrics
from components.batches import token_batches
from components.checkpoints import Checkpoints
from components.progress import Progress
from components.ranks import ALONE, Ranks
from components.settings import Training
from components.updates import Updater

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
    finish: Callable[[Metrics], object],
    prefix: str = "",
    ranks: Ranks = ALONE,
    begin: Callable[[], object] = lambda: None,
) -> Metrics:
    """Train `model` on `rows`; returns the last evaluation and the training metrics, which `finish` gets first.

    `finish` saves what was learned; the checkpoints stay until the caller clears them. `prefix` stands before the
    names of the metrics that are tracked, where one step trains several models. `ranks` are the processes that call it
    together, each of which learns from some micro-batches of every update. `begin` is called once the weights lie where
    they are trained, as they were given, also where a checkpoint follows.

    Continues from the newest checkpoint where there is one. The order of the rows depends on the seed alone. Raises
    Terminated after SIGTERM, once a checkpoint holds all that was learned, the update at hand with it; an evaluation
    and `finish` are broken off and done again by the next start. Raises TrainingFailure as `Updater.step` does.
    """
    plan = list(_plan(objective, rows, settings, seed, ranks.size))
    updater = Updater(model, settings.optimizer, settings.compute, len(plan), ranks=ranks)
    begin()
    with termination.watch() as watch:
        course = _Course(label, updater, settings.eval_every, evaluate, checkpoints, watch, prefix)
        course.resume()
        for batches in plan[updater.update :]:
            course.finish(_update(updater, objective, [[rows[i] for i in batch] for batch in batches]))
        model.eval()
        metrics = course.last()
        with course.repeatable():
            finish(metrics)
        watch.dismiss()
    return metrics


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
        self.kept: int | None = None  # the update that the newest checkpoint holds, its evaluation with it
        self.progress = Progress(label, updater.total_updates)

    def resume(self) -> None:
        """Take back the newest checkpoint, and finish the update whose evaluation was broken off."""
        checkpoint = self.checkpoints.agreed(self.updater.ranks)
        if checkpoint is None:
            return
        self.updater.restore(checkpoint.tensors, checkpoint.values["updater"], checkpoint.source)
        self.history = [tracking.Row(*row) for row in checkpoint.values["history"]]
        tracking.replay(self.history)
        self.progress.done = len(self.history)
        logger.info("%s continues from update %d of %d", self.label, self.updater.update, self.updater.total_updates)
        if checkpoint.values["unfinished"] is not None:
            self.finish(checkpoint.values["unfinished"])
        else:
            self.kept = self.updater.update

    def last(self) -> Metrics:
        """The numbers of the last update; the evaluation alone where there was none."""
        if not self.history:
            return self.evaluate()
        return {name.removeprefix(self.prefix): value for name, value in self.history[-1].metrics.items()}

    def finish(self, metrics: Metrics) -> None:
        """Evaluate where it is time, log, and write a checkpoint where it is time or the step is to stop."""
        update = self.updater.update
        if update == self.updater.total_updates or (self.eval_every and update % self.eval_every == 0):
            with self.repeatable(metrics):
                metrics = metrics | self.evaluate()
        self.history.append(tracking.log_metrics({self.prefix + name: metrics[name] for name in metrics}, update))
        self.progress.advance(loss=metrics["loss/train"])
        asked = self.updater.ranks.asked(self.watch)
        if self.checkpoints.due(update) or asked:
            self._save(self.updater.state())
        self.watch.check()

    def repeatable(self, unfinished: Metrics | None = None) -> AbstractContextManager[None]:
        """What SIGTERM breaks off inside is done again by the next start, from all that was so before it.

        `unfinished` is what the last update measured, where its evaluation is what is broken off.
        """
        ranks = self.updater.ranks
        return ranks.repeatable(self.watch, self.updater.state, lambda before: self._save(before, unfinished))

    def _save(self, tensors: dict[str, Tensor], unfinished: Metrics | None = None) -> None:
        """A checkpoint; the newest is left alone where it holds the same, for one that is replaced may be lost."""
        update = self.updater.update
        if update == self.kept:
            return
        values = {"updater": self.updater.values(), "history": self.history, "unfinished": unfinished}
        self.checkpoints.save(update, tensors, values)
        self.updater.ranks.barrier()
        self.kept = None if unfinished else update


def _plan(
    objective: Objective, rows: Sequence[Any], settings: Training, seed: int, processes: int
) -> Iterator[list[list[int]]]:
    """The micro-batches of every update of every epoch, over all processes."""
    lengths, size = [objective.length(row) for row in rows], settings.accumulation * processes
    for epoch in range(settings.epochs):
        batches = token_batches(lengths, settings.batch_tokens, seed + 1000 * epoch)
        for start in range(0, len(batches), size):
            yield batches[start : start + size]


def _update(updater: Updater, objective: Objective, micro_batches: Sequence[Sequence[Any]]) -> Metrics:
    """One optimiser step over some micro-batches, of which each process reads its share."""
    updater.model.train()
    every_row = [row for rows in micro_batches for row in rows]
    terms = float(sum(map(objective.terms, every_row)))
    updater.count(samples=len(every_row), tokens=sum(map(objective.length, every_row)))
    sums: dict[str, tuple[float, float]] = {}
    for rows, weight in updater.ranks.share(micro_batches):
        loss = objective.loss(updater.model, rows)
        updater.backward(loss.total * weight, terms)
        for name, value in {"loss/train": loss.total.item(), **loss.sums}.items():
            sums[name] = sums.get(name, (0.0, 0.0))[0] + value * weight, 0.0
    totals = updater.ranks.totals(sums)
    return {name: value / terms for name, (value, _) in totals.items()} | updater.step()
