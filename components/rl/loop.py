"""The loop: for each rollout, targets; for each pass and minibatch, loss, backward, clip, step.

It knows no algorithm and no engine: those are objects it is given.
"""

import logging
import math
import time

import torch

from components import tracking
from components.artifacts import Metrics
from components.checkpoints import Checkpoints
from components.progress import Progress
from components.rl.rollout import RolloutSource, rollout_metrics
from components.rl.settings import RLSettings
from components.rl.types import Algorithm, Batch, Forward
from components.updates import Updater, total

logger = logging.getLogger(__name__)


def train(
    settings: RLSettings,
    algorithm: Algorithm,
    source: RolloutSource,
    updater: Updater,
    sampler_random: torch.Generator,
    checkpoints: Checkpoints,
) -> Metrics:
    """Learn from `settings.rollouts` rollouts; returns the metrics averaged over the last tenth of them.

    Continues from the newest checkpoint where there is one, with the same numbers as if it had never stopped. The
    checkpoints stay until the caller has saved the model and clears them.
    """
    shuffles = torch.Generator().manual_seed(settings.seed)
    generators = {"random.sampler": sampler_random, "random.shuffles": shuffles}
    done, history = _resume(checkpoints, updater, algorithm, generators)
    telling = max(1, settings.rollouts // 10)
    progress = Progress("rl", settings.rollouts)
    progress.done = done
    started = time.monotonic()
    for number, rollout in enumerate(source.rollouts(done, settings.rollouts), start=done + 1):
        metrics = rollout_metrics(rollout) | {"perf/rollout_s": time.monotonic() - started}
        batch = algorithm.targets(rollout)
        metrics |= batch.metrics | _learn(settings, algorithm, batch, updater, shuffles)
        metrics["perf/seconds"] = time.monotonic() - started
        started = time.monotonic()
        history.append(metrics)
        tracking.log_metrics(metrics, number)
        progress.advance(1, **{name: metrics[name] for name in SHOWN if name in metrics})
        if checkpoints.due(number):
            tensors = updater.state() | {name: g.get_state() for name, g in generators.items()}
            values = {
                "rollouts": number,
                "updater": updater.values(),
                "algorithm": algorithm.state_dict(),
                "history": history[-telling:],
            }
            checkpoints.save(updater.update, tensors, values)
    return averages(history[-telling:])


SHOWN = ("rollout/score", "rollout/cost", "rollout/kl_k3", "cost/lambda")
"""The metrics beside the progress bar."""


def num_updates(settings: RLSettings, group_size: int) -> int:
    """Optimiser steps in the whole run."""
    rows = settings.prompts_per_rollout * group_size
    return settings.rollouts * settings.epochs * math.ceil(rows / settings.minibatch_size)


def averages(history: list[Metrics]) -> Metrics:
    """The mean of every metric over the rows that have it."""
    names = dict.fromkeys(name for row in history for name in row)
    return {
        name: sum(row[name] for row in history if name in row) / sum(name in row for row in history) for name in names
    }


def _resume(
    checkpoints: Checkpoints, updater: Updater, algorithm: Algorithm, generators: dict[str, torch.Generator]
) -> tuple[int, list[Metrics]]:
    """Take back the newest checkpoint; returns how many rollouts are done, and the metrics of the last of them."""
    checkpoint = checkpoints.latest()
    if checkpoint is None:
        return 0, []
    for name, generator in generators.items():
        generator.set_state(checkpoint.tensors[name])
    updater.restore(checkpoint.tensors, checkpoint.values["updater"], checkpoint.source)
    algorithm.load_state_dict(checkpoint.values["algorithm"])
    logger.info("rl continues after rollout %d", checkpoint.values["rollouts"])
    return int(checkpoint.values["rollouts"]), list(checkpoint.values["history"])


def _learn(
    settings: RLSettings, algorithm: Algorithm, batch: Batch, updater: Updater, shuffles: torch.Generator
) -> Metrics:
    """All passes over one batch; returns the means over them, and the largest ratio gap of the first update."""
    updates: list[Metrics] = []
    for _ in range(settings.epochs):
        for minibatch in batch.minibatches(settings.minibatch_size, shuffles):
            updates.append(_update(settings, algorithm, minibatch, updater))
    first = {"policy/first_ratio_gap": updates[0]["policy/ratio_gap"]}
    return averages(updates) | first


def _update(settings: RLSettings, algorithm: Algorithm, minibatch: Batch, updater: Updater) -> Metrics:
    """One optimiser step; the loss is normalised by the terms of the whole minibatch over all processes."""
    # Dropout is off in every model, so train mode changes nothing but gradient checkpointing.
    updater.model.train()
    own_terms = algorithm.terms(minibatch)
    terms = float(total(torch.tensor(own_terms)))
    sums: Metrics = {}
    gap = 0.0
    parts = list(minibatch.micro_batches(settings.micro_batch_size))
    for number, part in enumerate(parts, start=1):
        forward: Forward = updater.model(part.input_ids, part.attention_mask, part.mask.shape[1])
        loss, metrics = algorithm.loss(part, forward)
        updater.backward(loss, terms, last=number == len(parts))
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value
        log_ratio = (forward.logprobs.detach() - part.logprobs).masked_fill(~part.mask, 0.0)
        gap = max(gap, float(log_ratio.abs().max()))
    return {name: value / own_terms for name, value in sums.items()} | updater.step() | {"policy/ratio_gap": gap}
