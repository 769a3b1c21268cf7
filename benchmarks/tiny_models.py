"""Tiny real models, a tokenizer, data and rl settings: what tests and benchmarks run the steps on, in a second."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from components.artifacts import DataDir, ModelCard, folder_digest
from components.base import architecture
from components.models import policy_card, save_model, scalar_from_policy, with_lora
from components.records import Demonstration, Message, Preference, Prompt
from components.rl.algorithm_settings import (
    AlgorithmSettings,
    BestOfKSettings,
    DPOSettings,
    GRPOSettings,
    OnlineDPOSettings,
    PPOLagSettings,
    PPOSettings,
    RLOOSettings,
)
from components.rl.settings import AlertSettings, RLSettings
from components.settings import Compute, Generation, Lora, Optimizer
from components.tokens import load_tokenizer, template_digest

TINY = (32, 2, 2, 1, 64)
"""Hidden, layers, heads, key-value heads, feed-forward."""
WORDS = ("red", "blue", "green", "seven", "three", "north")
ALGORITHMS: dict[str, tuple[AlgorithmSettings, int]] = {
    "ppo": (PPOSettings(), 8),
    "ppo_lag": (PPOLagSettings(), 8),
    "rloo": (RLOOSettings(), 2),
    "grpo": (GRPOSettings(group_size=4), 2),
    "online_dpo": (OnlineDPOSettings(), 4),
    "best_of_k": (BestOfKSettings(group_size=2), 8),
    "dpo": (DPOSettings(), 4),
}
"""Every algorithm by its name, and how many prompts (for dpo, pairs) give 8 rows to learn from."""
ROLLOUTS, ROLLOUT_UPDATES = 5, 4
"""Of `tiny_rl`."""


def make_tokenizer() -> Any:
    """A byte-level tokenizer of some 300 tokens, with a chat template."""
    texts = [f"which word follows {word}? yes, {word} it is. no, never {word}!" for word in WORDS]
    return architecture.train_tokenizer(texts, 300)


def make_policy(folder: Path, tokenizer: Any) -> Path:
    """A random Llama of hidden size 32 in `folder`, its weights large enough that position and context matter."""
    torch.manual_seed(7)
    with patch.dict(architecture.SIZES, {"1m": TINY}):
        model = architecture.untrained_llama("1m", tokenizer, max_positions=128)
    _spread(model, 5.0)
    save_model(model, tokenizer, folder, policy_card("", "base", tokenizer), settings={}, parents={})
    return folder


def make_scalar(folder: Path, policy: Path, kind: str, mean: float, std: float, rank: int = 0) -> Path:
    """A reward or cost model in `folder`: the policy's backbone with a random head, normalised by mean and std.

    Above rank 0 it has random adapters, too, which are merged and kept apart as those of a trained one are.
    """
    scalar = scalar_from_policy(policy)
    torch.manual_seed(len(kind))
    nn.init.normal_(scalar.model.score.weight, std=0.3)
    model = with_lora(scalar.model, Lora(rank=rank), task_type="SEQ_CLS")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    tokenizer = load_tokenizer(policy)
    card = ModelCard(kind, folder_digest(policy), kind, template_digest(tokenizer), mean, std)
    save_model(model, tokenizer, folder, card, settings={}, parents={"policy": policy})
    return folder


def make_data(folder: Path) -> Path:
    """An easy task in `folder`: repeat the word, yes is better and safe, no worse and unsafe; 24 train, 6 test rows."""
    records: dict[tuple[str, str], list[Any]] = {}
    for split, numbers in (("train", range(24)), ("test", range(24, 30))):
        for number in numbers:
            word = WORDS[number % len(WORDS)]
            prompt = (Message("user", f"say {word} {number}"),)
            records.setdefault(("demonstrations", split), []).append(
                Demonstration(f"d{number}", prompt, f"yes, {word}", "made")
            )
            for dimension in ("helpful", "harmless"):
                records.setdefault(("preferences", split), []).append(
                    Preference(
                        f"{dimension}{number}", prompt, "yes", "no, never", dimension, True, False, "made"
                    )
                )
            records.setdefault(("prompts", split), []).append(Prompt(f"p{number}", prompt, "made", "fact"))
    DataDir.write(folder, records, {}, {})
    return folder


def make_inputs(folder: Path) -> dict[str, Path]:
    """What the rl step takes, in `folder`: data, policy, reward and cost model."""
    policy = make_policy(folder / "policy", make_tokenizer())
    return {
        "data": make_data(folder / "data"),
        "policy": policy,
        "reward": make_scalar(folder / "reward", policy, "reward", 0.5, 2.0),
        "cost": make_scalar(folder / "cost", policy, "cost", 0.0, 2.0),
    }


def tiny_rl(algorithm: str, dtype: str, /, **fields: Any) -> RLSettings:
    """Settings of an rl run of a second: ROLLOUTS rollouts of 8 rows, each 2 passes of 2 updates.

    `fields` replaces settings of the run or, under "algorithm", of the algorithm.
    """
    chosen, prompts = ALGORITHMS[algorithm]
    rates = {"lr": 1e-3, "schedule": "constant", "warmup": 0.0}
    defaults: dict[str, Any] = {
        "algorithm": chosen.model_validate(chosen.model_dump() | fields.pop("algorithm", {})),
        "rollouts": ROLLOUTS,
        "prompts_per_rollout": prompts,
        "epochs": 2,
        "minibatch_size": 4,
        "micro_batch_size": 4,
        "generation": Generation(max_new_tokens=6, max_prompt_tokens=24),
        "optimizer": Optimizer(**rates),
        "critic_optimizer": Optimizer(**rates),
        "compute": Compute(dtype=dtype),
        "alerts": AlertSettings(patience=2),  # so that there are some
        "checkpoint_every": 2,
    }
    return RLSettings(**(defaults | fields))


def silence() -> None:
    """Keep the progress bars and the advice of transformers off the screen."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@torch.no_grad()
def _spread(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(factor)
