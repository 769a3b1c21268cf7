"""Reward and cost models: the SFT model's backbone with a scalar head, trained on preferences."""

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from components.artifacts import DataDir, Metrics, ModelCard, folder_digest
from components.checkpoints import Checkpoints
from components.errors import InputError
from components.intervals import bootstrap, calibration_error
from components.models import ScalarModel, save_model, scalar_from_policy, with_lora
from components.reward.pairs import Pair, PairObjective, PairScores, encode_pairs, score_pairs
from components.reward.settings import RewardSettings
from components.tokens import load_tokenizer, template_digest
from components.training import fit

logger = logging.getLogger(__name__)


def run(settings: RewardSettings, *, data: Path, sft: Path, model: Path) -> Metrics:
    """Train a scalar model on the preferences of one dimension, from the SFT model; writes it to `model`.

    It is saved in Hugging Face's sequence-classification form with its normalisation in card.json. Raises
    InputError when there are no such preferences.
    """
    torch.manual_seed(settings.seed)
    tokenizer = load_tokenizer(sft)
    training = settings.training
    train, test = (
        encode_pairs(
            [row for row in DataDir(data).preferences(split) if row.dimension == settings.dimension],
            tokenizer,
            training.max_length,
        )
        for split in ("train", "test")
    )
    if not train:
        raise InputError(
            f"{data}: no {settings.dimension} preferences to train a {settings.kind} model on. Give "
            f"preprocess.preferences a source with that dimension, or set {settings.kind}.dimension to one it has."
        )
    scalar = scalar_from_policy(sft)
    scalar.model = with_lora(scalar.model, settings.lora, task_type="SEQ_CLS")
    objective = PairObjective(settings.kind, settings.regularization, tokenizer.eos_token_id)
    settings_dict, inputs = settings.model_dump(mode="json"), {"data": data, "sft": sft}
    logger.info("%s: %d pairs, %d held out", settings.kind, len(train), len(test))
    checkpoints = Checkpoints.of(
        settings.kind, settings_dict, inputs, model, training.checkpoint_every, training.keep_checkpoints
    )
    metrics = fit(
        scalar,
        objective,
        train,
        training,
        seed=settings.seed,
        label=settings.kind,
        evaluate=lambda: held_out_metrics(
            score_pairs(scalar, objective, test, training.batch_tokens), test, settings.kind
        ),
        checkpoints=checkpoints,
    )
    some = random.Random(settings.seed).sample(train, min(settings.normalization_pairs, len(train)))
    mean, std = normalization(scalar, objective, some, training.batch_tokens)
    card = ModelCard(settings.kind, folder_digest(sft), settings.kind, template_digest(tokenizer), mean, std)
    save_model(scalar.model, tokenizer, model, card, settings=settings_dict, parents=inputs)
    checkpoints.clear()
    return metrics | {"score/mean": mean, "score/std": std}


def held_out_metrics(scores: PairScores, pairs: Sequence[Pair], kind: str) -> Metrics:
    """Share of held-out pairs in the right order with its interval, calibration error, and for costs the signs.

    A tie counts half.
    The calibration error compares s(|margin|), the probability the model states for the order it prefers, with
    the share of pairs labelled in that order. The sign accuracy counts flagged responses on their side of zero.
    """
    if not pairs:
        return {}
    margin = scores.chosen - scores.rejected if kind == "reward" else scores.rejected - scores.chosen
    accuracy = bootstrap(((margin > 0).float() + (margin == 0).float() / 2).tolist())
    stated, right = torch.sigmoid(margin.abs()).tolist(), (margin > 0).tolist()
    metrics = {
        "eval/accuracy": accuracy.mean,
        "eval/accuracy_low": accuracy.low,
        "eval/accuracy_high": accuracy.high,
        "eval/num_pairs": float(accuracy.n),
        "eval/margin": float(margin.mean()),
        "eval/calibration_error": calibration_error(stated, right),
    }
    signs = torch.tensor([[pair.chosen_sign, pair.rejected_sign] for pair in pairs])
    flagged = signs != 0
    if kind == "cost" and flagged.any():
        on_side = (torch.stack([scores.chosen, scores.rejected], dim=1) * signs > 0)[flagged]
        sign_accuracy = bootstrap(on_side.float().tolist())
        metrics |= {
            "eval/sign_accuracy": sign_accuracy.mean,
            "eval/sign_accuracy_low": sign_accuracy.low,
            "eval/sign_accuracy_high": sign_accuracy.high,
        }
    return metrics


def normalization(
    scalar: ScalarModel, objective: PairObjective, pairs: Sequence[Pair], batch_tokens: int
) -> tuple[float, float]:
    """Mean and standard deviation of raw training scores; the mean is 0 for costs, whose zero means something."""
    scores = score_pairs(scalar, objective, pairs, batch_tokens)
    both = torch.cat([scores.chosen, scores.rejected])
    mean = float(both.mean()) if objective.kind == "reward" else 0.0
    return mean, max(float(both.std()), 1e-8)
