"""Reward and cost models: the SFT model's backbone with a scalar head, trained on preferences."""

import logging
from pathlib import Path
from typing import Any

from components.artifacts import DataDir, Metrics, ModelCard, member_folders
from components.errors import InputError
from components.models import load_scalar, save_model
from components.reward.measures import ensemble_metrics
from components.reward.members import Lesson, finish_member, finished_members, train_member
from components.reward.pairs import PairObjective, encode_pairs, score_pairs
from components.reward.settings import RewardSettings
from components.tokens import load_tokenizer

logger = logging.getLogger(__name__)


def run(settings: RewardSettings, *, data: Path, sft: Path, model: Path) -> Metrics:
    """Train a scalar model on the preferences of one dimension, from the SFT model; writes it to `model`.

    It is saved in Hugging Face's sequence-classification form with its normalisation in card.json; the further
    members of an ensemble lie in folders of the same form below it. Raises InputError when there are no such
    preferences.
    """
    lesson = _lesson(settings, data, sft, model)
    logger.info("%s: %d pairs, %d held out", settings.kind, len(lesson.train), len(lesson.test))
    further = range(1, settings.members)
    for number in further:
        finish_member(lesson, number)
    plain = settings.model_dump(mode="json")

    def keep(first: Any, card: ModelCard) -> None:
        others = finished_members(lesson)
        save_model(first, lesson.tokenizer, model, card, settings=plain, parents=lesson.inputs, members=others)

    metrics = train_member(lesson, 0, keep)  # last, so that it goes from memory to where it belongs
    if further:
        metrics |= _ensemble_metrics(lesson, model)
    lesson.checkpoints(0).clear()
    for number in further:
        lesson.checkpoints(number, finished=True).clear()
    return metrics


def _lesson(settings: RewardSettings, data: Path, sft: Path, model: Path) -> Lesson:
    """The pairs of the settings' dimension as token ids. Raises InputError when there are none to train on."""
    tokenizer = load_tokenizer(sft)
    train, test = (
        encode_pairs(
            [row for row in DataDir(data).preferences(split) if row.dimension == settings.dimension],
            tokenizer,
            settings.training.max_length,
        )
        for split in ("train", "test")
    )
    if not train:
        raise InputError(
            f"{data}: no {settings.dimension} preferences to train a {settings.kind} model on. Give "
            f"preprocess.preferences a source with that dimension, or set {settings.kind}.dimension to one it has."
        )
    objective = PairObjective(settings.kind, settings.regularization)
    return Lesson(settings, objective, train, test, tokenizer, {"data": data, "sft": sft}, model)


def _ensemble_metrics(lesson: Lesson, model: Path) -> Metrics:
    """Held-out metrics of all members in the model's folder, one in memory after the other."""
    budget = lesson.settings.training.batch_tokens
    scores = [
        score_pairs(load_scalar(folder), lesson.objective, lesson.test, budget)
        for folder in (model, *member_folders(model))
    ]
    return ensemble_metrics(scores, lesson.settings.kind)
