"""Training of one scalar model, and of further ones for an ensemble.

The first model sees every pair once per epoch. Each further one sees a bootstrap resample of as many pairs, drawn
with replacement, in another order (Breiman 1996, "Bagging Predictors"): what the pairs leave open, such models fill
in differently, so their disagreement says how far a score is from what the pairs teach. Other seeds alone would not
do: all models start from the same backbone with a head at zero.
"""

import logging
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from components.artifacts import Metrics, ModelCard, folder_digest, verify_manifest
from components.checkpoints import Checkpoints
from components.errors import InputError
from components.models import ScalarModel, save_model, scalar_from_policy, with_lora
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

    def checkpoints(self, number: int) -> Checkpoints:
        """Those of a member."""
        settings, every = self.settings, self.settings.training.checkpoint_every
        name = settings.kind if number == 0 else f"{settings.kind}-{number}"
        return Checkpoints.of(name, settings.model_dump(mode="json"), self.inputs, self.output, every)


@dataclass(frozen=True)
class Trained:
    """A trained scalar model."""

    model: Any
    card: ModelCard
    metrics: Metrics


def train_member(lesson: Lesson, number: int) -> Trained:
    """Member `number` (0 is the first), with its held-out metrics and its normalisation."""
    settings, objective, sft = lesson.settings, lesson.objective, lesson.inputs["sft"]
    seed = settings.seed + STRIDE * number
    torch.manual_seed(seed)
    scalar = scalar_from_policy(sft)
    scalar.model = with_lora(scalar.model, settings.lora, task_type="SEQ_CLS")
    budget = settings.training.batch_tokens
    metrics = fit(
        scalar,
        objective,
        lesson.train if number == 0 else random.Random(seed).choices(lesson.train, k=len(lesson.train)),
        settings.training,
        seed=seed,
        label=settings.kind if number == 0 else f"{settings.kind} member {number}",
        evaluate=lambda: held_out_metrics(
            score_pairs(scalar, objective, lesson.test, budget), lesson.test, settings.kind
        ),
        checkpoints=lesson.checkpoints(number),
    )
    some = random.Random(settings.seed).sample(lesson.train, min(settings.normalization_pairs, len(lesson.train)))
    mean, std = normalization(scalar, objective, some, budget)
    card = ModelCard(
        settings.kind, folder_digest(sft), settings.kind, template_digest(lesson.tokenizer), mean, std
    )
    return Trained(scalar.model, card, metrics | {"score/mean": mean, "score/std": std})


def finished_member(lesson: Lesson, number: int) -> Path:
    """The folder of a further member: one that an interrupted run has finished, or trained now.

    It lies beside the member's checkpoints, under their key, until the caller has copied it to where it belongs.
    """
    checkpoints = lesson.checkpoints(number)
    folder = checkpoints.folder.with_name(f"{checkpoints.folder.name}-finished")
    if folder.exists():
        try:
            verify_manifest(folder)
        except InputError as error:
            logger.warning("member %d is trained again: %s", number, error)
            shutil.rmtree(folder)
        else:
            logger.info("member %d is finished already", number)
            return folder
    logger.info("%s: member %d of %d", lesson.settings.kind, number + 1, lesson.settings.members)
    trained = train_member(lesson, number)
    part = folder.with_name(f".{folder.name}.part")
    settings = lesson.settings.model_dump(mode="json")
    save_model(trained.model, lesson.tokenizer, part, trained.card, settings=settings, parents=lesson.inputs)
    part.rename(folder)
    checkpoints.clear()
    return folder


def normalization(
    scalar: ScalarModel, objective: PairObjective, pairs: Sequence[Pair], batch_tokens: int
) -> tuple[float, float]:
    """Mean and standard deviation of raw training scores; the mean is 0 for costs, whose zero means something."""
    scores = score_pairs(scalar, objective, pairs, batch_tokens)
    both = torch.cat([scores.chosen, scores.rejected])
    mean = float(both.mean()) if objective.kind == "reward" else 0.0
    return mean, max(float(both.std()), 1e-8)
