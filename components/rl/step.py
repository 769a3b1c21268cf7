"""Reinforcement learning: the SFT policy learns from the reward model, and from the cost model where one is used."""

import logging
from pathlib import Path

import torch

from components.artifacts import DataDir, Metrics, folder_digest
from components.checkpoints import Checkpoints
from components.errors import InputError
from components.generation.native import NativeSampler
from components.models import load_policy, load_scalar, policy_card, save_model, with_lora
from components.rl import algorithms
from components.rl.loop import num_updates, train
from components.rl.networks import PolicyAndValues
from components.rl.rollout import Models, PromptStream, RolloutSource
from components.rl.settings import RLSettings
from components.scoring import load_scorer
from components.tokens import Tokenizer, load_tokenizer
from components.updates import Updater, total

logger = logging.getLogger(__name__)


def run(settings: RLSettings, *, data: Path, policy: Path, reward: Path, cost: Path | None, model: Path) -> Metrics:
    """Train the policy on the training prompts in `data`; writes it to `model`.

    Critics start from the reward and the cost model. Raises InputError when the algorithm needs a cost model and
    there is none, when nothing is sampled, or when there are no prompts.
    """
    torch.manual_seed(settings.seed)
    if settings.needs_cost and cost is None:
        raise InputError(f"rl.algorithm.name is {settings.algorithm.name}: it needs a cost model and none was given.")
    if settings.generation.temperature == 0:
        raise InputError(
            "rl.generation.temperature is 0: the policy would never try anything but its likeliest token. "
            "Set it above 0; 1.0 samples the policy as it is."
        )
    generation = settings.generation
    if generation.top_p < 1 or generation.top_k:
        raise InputError(
            f"rl.generation has top_p {generation.top_p} and top_k {generation.top_k}: responses would be sampled from "
            "another distribution than the one that is trained. Leave them at 1.0 and 0."
        )
    if settings.lora.rank and settings.lora.dropout:
        raise InputError(
            f"rl.lora.dropout is {settings.lora.dropout}: the updated policy would differ from the sampled one before "
            "any update. Set it to 0."
        )
    prompts = [row.prompt for row in DataDir(data).prompts("train")]
    if not prompts:
        raise InputError(f"{data}: no training prompts; give preprocess.prompts a source.")
    tokenizer = load_tokenizer(policy)
    cost = cost if settings.needs_cost else None
    networks = _networks(settings, policy, reward, cost)
    critic = settings.optimizer.model_copy(update={"lr": settings.critic_lr})
    algorithm = algorithms.build(settings.algorithm, total)
    updates = num_updates(settings, algorithm.group_size)
    updater = Updater(networks, settings.optimizer, settings.compute, updates, {"value": critic, "cost_value": critic})
    sampler = NativeSampler(networks.policy, tokenizer.eos_token_id, settings.generation, settings.seed)
    models = _models(networks, sampler, tokenizer, policy, reward, cost, updater)
    source = RolloutSource(
        models,
        PromptStream(prompts, settings.seed),
        settings.prompts_per_rollout,
        algorithm.group_size,
        settings.generation.max_prompt_tokens,
        settings.micro_batch_size,
    )
    inputs = {"data": data, "policy": policy, "reward": reward} | ({} if cost is None else {"cost": cost})
    settings_dict = settings.model_dump(mode="json")
    checkpoints = Checkpoints.of("rl", settings_dict, inputs, model, settings.checkpoint_every)
    logger.info("rl: %s, %d prompts, %d rollouts", settings.algorithm.name, len(prompts), settings.rollouts)
    metrics = train(settings, algorithm, source, updater, sampler.generator, checkpoints)
    card = policy_card(folder_digest(policy), "rl", tokenizer)
    save_model(networks.policy, tokenizer, model, card, settings=settings_dict, parents=inputs)
    checkpoints.clear()
    return metrics


def _networks(settings: RLSettings, policy: Path, reward: Path, cost: Path | None) -> PolicyAndValues:
    """The policy and its critics, as they start."""
    return PolicyAndValues(
        with_lora(load_policy(policy), settings.lora),
        load_scalar(reward),
        None if cost is None else load_scalar(cost),
        settings.generation.temperature,
    )


def _models(
    networks: PolicyAndValues,
    sampler: NativeSampler,
    tokenizer: Tokenizer,
    policy: Path,
    reward: Path,
    cost: Path | None,
    updater: Updater,
) -> Models:
    """What rollouts read: the networks, the frozen reference, the sampler and the scorers."""
    return Models(
        networks,
        load_policy(policy),
        sampler,
        load_scorer(reward),
        None if cost is None else load_scorer(cost),
        tokenizer,
        updater.accelerator.autocast,
    )
