"""The loop: for each batch, for each pass and minibatch, loss, backward, clip, step; kept so that it can go on.

It knows no algorithm, no engine and no source of batches: those are objects it is given.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from components import tracking
from components.artifacts import Metrics
from components.checkpoints import Checkpoints
from components.monitoring import Monitor
from components.phases import Phases
from components.progress import Progress
from components.rl.course import PENDING, Course, pending, points
from components.rl.settings import RLSettings
from components.rl.types import Batch, Forward, Learner, Means, Source, State
from components.termination import Watch, watch
from components.tracking import Row
from components.updates import Updater

logger = logging.getLogger(__name__)

SHOWN = ("rollout/score", "rollout/cost", "rollout/kl_k3", "policy/pair_accuracy", "cost/lambda")
"""The metrics beside the progress bar."""
SHUFFLES = 1 << 40
"""Apart from the seeds of the passes over the prompts."""


class Extra(Protocol):
    """Something that adds to the gradient of every update."""

    def backward(self, updater: Updater) -> Metrics:
        """Add to the gradient of the update at hand."""
        ...


def train(
    settings: RLSettings,
    batches: int,
    learner: Learner,
    source: Source,
    updater: Updater,
    extras: Sequence[Extra],
    monitor: Monitor,
    checkpoints: Checkpoints,
    finish: Callable[[Course], None] = lambda course: None,
    phases: Phases | None = None,
) -> Course:
    """Learn from `batches` batches of the source; `finish` then saves what was learned. `phases` times the batches.

    Continues from the newest checkpoint where there is one, with the same numbers as if it had never stopped; the
    checkpoints stay until the caller clears them. Raises Terminated after SIGTERM, once a checkpoint holds all that
    was learned, the update at hand with it; the making of a batch and `finish` are broken off and done again by the
    next start. Raises TrainingFailure as `Updater.step` does.
    """
    loop = _Loop(settings, batches, learner, source, updater, extras, monitor, checkpoints, phases or Phases())
    with watch() as stop:
        course = loop.run(stop)
        with loop.repeatable(stop):
            finish(course)
        stop.dismiss()
    return course


def num_updates(settings: RLSettings, batches: int, rows_per_batch: int) -> int:
    """Optimiser steps in the whole run, when no batch drops rows."""
    return batches * settings.epochs * math.ceil(rows_per_batch / settings.minibatch_size)


def averages(rows: Sequence[Metrics]) -> Metrics:
    """The mean of every metric over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: sum(row[name] for row in rows if name in row) / sum(name in row for row in rows) for name in names}


class _State(NamedTuple):
    """What a checkpoint holds: tensors by name, those of the source, and the rest as JSON values."""

    tensors: dict[str, Tensor]
    source: State
    values: dict[str, Any]


@dataclass
class _Loop:
    settings: RLSettings
    batches: int
    learner: Learner
    source: Source
    updater: Updater
    extras: Sequence[Extra]
    monitor: Monitor
    checkpoints: Checkpoints
    phases: Phases
    course: Course = field(default_factory=Course)
    kept: tuple[int, int] | None = None  # batches and updates at the newest checkpoint

    def run(self, stop: Watch) -> Course:
        course = self.course = self._resumed()
        progress = Progress("rl", self.batches)
        progress.done = course.number
        self.phases.lap()  # what came before belongs to no batch
        while course.number < self.batches:
            course.batch = course.batch or self._next_batch(stop)
            for rows in self._plan(course.batch)[len(course.updates) :]:
                course.updates.append(self._timed_update(course.batch.rows(rows)))
                self._stop_if_asked(stop)
            row = self._finish(course.batch)
            progress.advance(1, **{name: row[name] for name in SHOWN if name in row})
            if self.checkpoints.due(course.number):
                self._save(self._state())
            self._stop_if_asked(stop)
        return course

    def repeatable(self, stop: Watch) -> AbstractContextManager[None]:
        """What SIGTERM breaks off inside is done again by the next start, from all that was so before it."""
        return self.updater.ranks.repeatable(stop, self._state, self._save)

    def _next_batch(self, stop: Watch) -> Batch:
        with self.repeatable(stop):
            return self.source.batch(self.course.number)

    def _plan(self, batch: Batch) -> list[Tensor]:
        seed = SHUFFLES + self.settings.seed * 1_000_003 + self.course.number
        return batch.plan(self.settings.epochs, self.settings.minibatch_size, seed)

    def _timed_update(self, minibatch: Batch) -> Metrics:
        with self.phases.phase("update", int(minibatch.attention_mask.sum())):
            return self._update(minibatch)

    def _update(self, minibatch: Batch) -> Metrics:
        """One optimiser step on the minibatch, of which each process reads its share; normalised by its terms."""
        # Dropout is off in every model, so train mode changes nothing but gradient checkpointing.
        self.updater.model.train()
        terms, ranks = self.learner.terms(minibatch), self.updater.ranks
        sums: Means = {}
        gap = 0.0
        for part, weight in ranks.share(list(minibatch.micro_batches(self.settings.micro_batch_size))):
            forward: Forward = self.updater.model(part.input_ids, part.attention_mask, part.mask.shape[1])
            loss, means = self.learner.loss(part, forward)
            self.updater.backward(loss * weight, terms)
            for name, (value, count) in means.items():
                summed, counted = sums.get(name, (0.0, 0.0))
                sums[name] = summed + value * weight, counted + count * weight
            gap = max(gap, ratio_gap(part, forward))
        metrics = {name: value / count for name, (value, count) in ranks.totals(sums).items()}
        for extra in self.extras:
            metrics |= extra.backward(self.updater)
        self.updater.count(samples=len(minibatch), tokens=int(minibatch.mask.sum()))
        gaps = {} if minibatch.logprobs is None else {"policy/ratio_gap": ranks.highest(gap)}
        return metrics | self.updater.step() | gaps

    def _finish(self, batch: Batch) -> Metrics:
        """Log what the batch and its updates measured."""
        course, updates = self.course, self.course.updates
        metrics = batch.metrics | averages(updates) | {"data/updates": float(len(updates))}
        for name in ("loss/skipped_updates", "data/samples", "data/tokens"):
            metrics |= {name: updates[-1][name]} if updates else {}
        if updates and "policy/ratio_gap" in updates[0]:
            metrics["policy/first_ratio_gap"] = updates[0]["policy/ratio_gap"]
        self.monitor.observe(metrics, course.number + 1)
        metrics["alerts/total"] = float(len(self.monitor.alerts))
        metrics |= self.phases.lap()  # so the checkpoint that comes after it belongs to the next batch
        if batch.scatter:
            course.scatter = {"first": course.scatter.get("first", batch.scatter), "last": batch.scatter}
        course.number += 1
        course.batch, course.updates = None, []
        # Batches may drop rows; the learning rate follows the plan.
        self.updater.update = num_updates(self.settings, course.number, self.source.rows_per_batch)
        course.history.append(tracking.log_metrics(metrics, course.number))
        return metrics

    def _stop_if_asked(self, stop: Watch) -> None:
        if self.updater.ranks.asked(stop):
            self._save(self._state())
        stop.check()

    def _state(self) -> _State:
        """What a checkpoint holds, as it is now."""
        course = self.course
        tensors, source = self.updater.state(), self.source.state()
        values = {name: getattr(course, name) for name in ("number", "updates", "history", "scatter")}
        values |= {"updater": self.updater.values(), "monitor": self.monitor.state_dict()}
        values["learner"] = self.learner.state_dict()
        if course.batch is not None:
            tensors |= {PENDING + name: tensor for name, tensor in course.batch.tensors().items()}
            values["batch"] = {name: getattr(course.batch, name) for name in ("unit", "group", "metrics", "scatter")}
        return _State(tensors, source, values)

    def _save(self, state: _State) -> None:
        """A checkpoint; the newest is left alone where it holds the same, for one that is replaced may be lost."""
        if (place := (self.course.number, len(self.course.updates))) != self.kept:
            with self.phases.phase("checkpoint"):
                self.checkpoints.save(self.updater.update, state.tensors | state.source(), state.values)
                self.updater.ranks.barrier()
            self.kept = place

    def _resumed(self) -> Course:
        """What the newest checkpoint holds, everything put back where it was; a fresh course without one."""
        checkpoint = self.checkpoints.agreed(self.updater.ranks)
        if checkpoint is None:
            return Course()
        values = checkpoint.values
        self.kept = values["number"], len(values["updates"])
        self.updater.restore(checkpoint.tensors, values["updater"], checkpoint.source)
        self.source.restore(checkpoint.tensors)
        self.learner.load_state_dict(values["learner"])
        self.monitor.load_state_dict(values["monitor"])
        history = [Row(*row) for row in values["history"]]
        tracking.replay(history)
        logger.info("rl continues after %d of %d batches", values["number"], self.batches)
        scatter = {name: points(pairs) for name, pairs in values["scatter"].items()}
        batch = pending(checkpoint, self.updater.device)
        return Course(values["number"], batch, values["updates"], history, scatter)


def ratio_gap(batch: Batch, forward: Forward) -> float:
    """The largest |ratio - 1| of a response token; 0 for rows that no policy sampled."""
    if batch.logprobs is None:
        return 0.0
    ratio = (forward.logprobs.detach() - batch.logprobs).masked_fill(~batch.mask, 0.0).exp()
    return float((ratio - 1).abs().max())
