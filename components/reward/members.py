"""Training of one scalar model, and of further ones for an ensemble.

The first model sees every pair once per epoch. Each further one sees a bootstrap resample of as many pairs, drawn
with replacement, in another order (Breiman 1996, "Bagging Predictors"): what the pairs leave open, such models fill
in differently, so that they disagree where the pairs do not settle a score. Another order alone would vary them less:
all start from the same backbone with a head at zero.
"""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from components import tracking
from components.artifacts import Metrics, ModelCard, folder_digest
from components.checkpoints import Checkpoints
from components.gathering import copied, gathered
from components.models import ScalarModel, scalar_from_policy, with_lora
from components.ranks import ALONE, Ranks, join
from components.reward.measures import held_out_metrics
from components.reward.pairs import Pair, PairObjective, score_pairs
from components.reward.settings import RewardSettings
from components.tokens import Tokenizer, template_digest
from components.training import fit

logger = logging.getLogger(__name__)

STRIDE = 1_000_003
"""Between the seeds of two members; none meets a seed that an epoch takes."""


@dataclass(frozen=True)
class Lesson:
    """What every member learns, and from what."""

    settings: RewardSettings
    objective: PairObjective
    train: Sequence[Pair]
    test: Sequence[Pair]
    tokenizer: Tokenizer
    inputs: Mapping[str, Path]
    """data and sft."""
    output: Path

    def checkpoints(self, number: int, finished: bool = False) -> Checkpoints:
        """Those of a member's training, or the one that holds it `finished`."""
        training = self.settings.training
        name = "-".join([self.settings.kind, *([str(number)] if number else []), *(["finished"] if finished else [])])
        plain = self.settings.model_dump(mode="json")
        return Checkpoints.of(
            name, plain, self.inputs, self.output, training.checkpoint_every, training.keep_checkpoints
        )

    def card(self, mean: float, std: float) -> ModelCard:
        """The card of a member with this normalisation."""
        kind, base = self.settings.kind, folder_digest(self.inputs["sft"])
        return ModelCard(kind, base, kind, template_digest(self.tokenizer), mean, std)


def train_member(lesson: Lesson, number: int, keep: Callable[[Any, ModelCard], None]) -> Metrics:
    """Train member `number` (0 is the first); returns its held-out metrics and its normalisation.

    `keep` saves the model with its adapters; what SIGTERM breaks off of that is done again by the next start.
    """
    settings, objective, ranks = lesson.settings, lesson.objective, join()
    seed = settings.seed + STRIDE * number
    torch.manual_seed(seed)
    scalar = scalar_from_policy(lesson.inputs["sft"], divide=settings.training.compute.strategy == "zero3")
    scalar.model = with_lora(scalar.model, settings.lora, task_type="SEQ_CLS")
    budget = settings.training.batch_tokens
    some = random.Random(settings.seed).sample(lesson.train, min(settings.normalization_pairs, len(lesson.train)))
    scale: Metrics = {}

    def finish(_: Metrics) -> None:
        mean, std = normalization(scalar, objective, some, budget, ranks) if settings.normalize else (0.0, 1.0)
        scale.update({"score/mean": mean, "score/std": std})
        keep(scalar.model, lesson.card(mean, std))

    metrics = fit(
        scalar,
        objective,
        lesson.train if number == 0 else random.Random(seed).choices(lesson.train, k=len(lesson.train)),
        settings.training,
        seed=seed,
        label=settings.kind if number == 0 else f"{settings.kind} member {number}",
        evaluate=lambda: held_out_metrics(
            score_pairs(scalar, objective, lesson.test, budget, ranks), lesson.test, settings.kind
        ),
        checkpoints=lesson.checkpoints(number),
        finish=finish,
        prefix=f"member_{number}/" if number else "",
        ranks=ranks,
    )
    return metrics | scale


def finish_member(lesson: Lesson, number: int) -> None:
    """Leave a checkpoint with member `number` as it is when trained, unless an interrupted run has left it already.

    What was trained of it, its normalisation and the metrics of its updates, and nothing of the optimiser, so that all
    members together take little room.
    """
    finished = lesson.checkpoints(number, finished=True)
    if checkpoint := finished.latest():
        logger.info("%s: member %d is trained already", lesson.settings.kind, number)
        tracking.replay([tracking.Row(*row) for row in checkpoint.values["history"]])
        lesson.checkpoints(number).clear()
        return
    logger.info("%s: member %d of %d further ones", lesson.settings.kind, number, lesson.settings.members - 1)
    before = len(tracking.history())

    def keep(model: Any, card: ModelCard) -> None:
        values = {"mean": card.score_mean, "std": card.score_std, "history": tracking.history()[before:]}
        finished.save(1, copied(_trained(model)), values)

    train_member(lesson, number, keep)
    lesson.checkpoints(number).clear()


def finished_members(lesson: Lesson) -> Iterator[tuple[Any, ModelCard]]:
    """Every further member with its card, in order, read from its checkpoint when it is asked for."""
    for number in range(1, lesson.settings.members):
        checkpoint = lesson.checkpoints(number, finished=True).latest()
        assert checkpoint is not None, "finish_member comes first"
        divide = lesson.settings.training.compute.strategy == "zero3"
        model = scalar_from_policy(lesson.inputs["sft"], divide=divide).model
        model = with_lora(model, lesson.settings.lora, task_type="SEQ_CLS")
        for name, parameter in _trained(model).items():
            with torch.no_grad(), gathered([parameter], changed=True):
                parameter.copy_(checkpoint.tensors[name])
        yield model, lesson.card(checkpoint.values["mean"], checkpoint.values["std"])


def _trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """All weights, or with adapters those and the head: the others are the SFT model's."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def normalization(
    scalar: ScalarModel, objective: PairObjective, pairs: Sequence[Pair], batch_tokens: int, ranks: Ranks = ALONE
) -> tuple[float, float]:
    """Mean and standard deviation of raw training scores; the mean is 0 for costs, whose zero means something."""
    scores = score_pairs(scalar, objective, pairs, batch_tokens, ranks)
    both = torch.cat([scores.chosen, scores.rejected])
    mean = float(both.mean()) if objective.kind == "reward" else 0.0
    return mean, max(float(both.std()), 1e-8)
