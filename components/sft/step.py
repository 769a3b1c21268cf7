"""Supervised fine-tuning: the base model learns to respond as the demonstrations do."""

import logging
from pathlib import Path

import torch

from components.artifacts import DataDir, Metrics, folder_digest
from components.checkpoints import Checkpoints
from components.errors import InputError
from components.likelihood import Likelihood, demonstration_passages, evaluate_likelihood
from components.logprobs import LanguageModel
from components.models import load_policy, policy_card, save_model, with_lora
from components.ranks import join
from components.sft.settings import SFTSettings
from components.tokens import load_tokenizer
from components.training import fit

logger = logging.getLogger(__name__)


def run(settings: SFTSettings, *, data: Path, base: Path, model: Path) -> Metrics:
    """Train on the demonstrations in `data`, from `base`; writes the policy to `model`.

    Prompt tokens carry no loss; the end-of-sequence token does. Raises InputError when there is nothing to learn.
    """
    ranks = join()
    torch.manual_seed(settings.seed)
    tokenizer = load_tokenizer(base)
    training, max_length = settings.training, settings.training.max_length
    rows = demonstration_passages(DataDir(data).demonstrations("train"), tokenizer, max_length)
    held_out = demonstration_passages(DataDir(data).demonstrations("test"), tokenizer, max_length)
    if not rows:
        raise InputError(f"{data}: no demonstrations to train on; give preprocess.demonstrations a source.")
    policy = with_lora(load_policy(base, divide=training.compute.strategy == "zero3"), settings.lora)
    reader, before = LanguageModel(policy), Metrics()

    def evaluate() -> Metrics:
        return evaluate_likelihood(reader, held_out, training.batch_tokens, ranks)

    settings_dict = settings.model_dump(mode="json")
    inputs = {"data": data, "base": base}
    logger.info("sft: %d demonstrations, %d held out, %d tokens at most", len(rows), len(held_out), max_length)
    checkpoints = Checkpoints.of(
        "sft", settings_dict, inputs, model, training.checkpoint_every, training.keep_checkpoints
    )
    card = policy_card(folder_digest(base), "sft", tokenizer)
    metrics = fit(
        reader,
        Likelihood(),
        rows,
        training,
        seed=settings.seed,
        label="sft",
        evaluate=evaluate,
        begin=lambda: before.update(evaluate()),  # adapters change nothing yet
        checkpoints=checkpoints,
        finish=lambda _: save_model(policy, tokenizer, model, card, settings=settings_dict, parents=inputs),
        ranks=ranks,
    )
    checkpoints.clear()
    return metrics | {f"{name}_before": value for name, value in before.items()}
