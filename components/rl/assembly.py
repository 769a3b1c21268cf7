"""What a run is put together from: networks, reference, and the source of batches."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from components.artifacts import DataDir, folder_digest
from components.checkpoints import Checkpoints
from components.errors import InputError
from components.generation import PolicySampler
from components.generation.native import NativeSampler
from components.models import ScalarModel, device, load_policy, load_scalar, scalar_from_policy, with_lora
from components.phases import Phases, measurable_memory
from components.records import Conversation
from components.rl.ahead import Ahead, DraftMaker
from components.rl.algorithm_settings import DPOSettings
from components.rl.algorithms.dpo import DPO
from components.rl.drafts import Drafting, Drafts, Models
from components.rl.networks import Networks, SharedHead
from components.rl.pairs import PairLogprobs, PairSource, encode_pairs, pairs_digest
from components.rl.reference import AdapterOff, FrozenReference, Reference
from components.rl.rollout import RolloutSource
from components.rl.settings import RLSettings
from components.rl.stream import Stream
from components.rl.types import Algorithm, Source
from components.scoring import ModelScorer, SharedBackbone, build_scorer, load_scorer
from components.settings import NativeSamplerSettings
from components.tokens import Tokenizer, load_tokenizer


def build_networks(settings: RLSettings, policy: Path, reward: Path | None, cost: Path | None) -> Networks:
    """The policy and its critics, as they start: from the scalar models, or as heads on the policy.

    Where scores come from elsewhere and there is no scalar model, the critic starts from the policy.
    Labelled pairs were sampled at no temperature: dpo compares plain log-probabilities. Raises InputError when a
    critic would read the policy's tokens by another vocabulary.
    """
    model = with_lora(load_policy(policy), settings.lora)
    folders = {"value": reward, "cost_value": cost}
    temperature = 1.0 if isinstance(settings.algorithm, DPOSettings) else settings.generation.temperature

    def critic(name: str) -> ScalarModel | SharedHead | None:
        if name not in settings.critics:
            return None
        if settings.share_backbone:
            return SharedHead(model.config.hidden_size).to(device())
        folder = folders[name]
        if folder is None:
            return scalar_from_policy(policy)
        _check_vocabulary(policy, folder)
        return load_scalar(folder)

    return Networks(model, critic("value"), critic("cost_value"), temperature)


def _check_vocabulary(policy: Path, scalar: Path) -> None:
    if load_tokenizer(policy).get_vocab() != load_tokenizer(scalar).get_vocab():
        raise InputError(
            f"{scalar}: its vocabulary is not that of the policy in {policy}, whose tokens the critic that starts from "
            "it would read. Train it from the policy's own base, set rl.share_backbone to true, or take an algorithm "
            "without a critic."
        )


def build_reference(settings: RLSettings, networks: Networks, policy: Path) -> Reference:
    """The policy as it started: with adapters, the policy without them; else a copy."""
    if settings.lora.rank:
        return AdapterOff(networks.policy, settings.compute.dtype)
    return FrozenReference(load_policy(policy, settings.frozen_dtype), settings.compute.dtype)


def build_source(
    settings: RLSettings,
    algorithm: Algorithm | DPO,
    networks: Networks,
    tokenizer: Tokenizer,
    data: Path,
    policy: Path,
    reward: Path | None,
    cost: Path | None,
    output: Path | None = None,
    phases: Phases | None = None,
) -> tuple[Source, int]:
    """Where batches come from, and how many there are to be; `phases` times their making.

    What the reference says of labelled pairs is kept where the checkpoints of `output` are. Raises InputError when
    there are no training prompts (for dpo, no training pairs).
    """
    phases = phases or Phases()
    if isinstance(settings.algorithm, DPOSettings):
        reference = build_reference(settings, networks, policy)
        pairs = _pair_source(settings, settings.algorithm, reference, tokenizer, data, policy, output, phases)
        return pairs, _batches(settings, len(pairs.stream.rows))
    assert not isinstance(algorithm, DPO)
    prompts = [row.prompt for row in DataDir(data).prompts("train")]
    if not prompts:
        raise InputError(f"{data}: no training prompts; give preprocess.prompts a source.")
    batches, size, micro = _batches(settings, len(prompts)), settings.prompts_per_rollout, settings.micro_batch_size
    drafts: Drafts
    if settings.overlap is None:
        models = networks.policy, policy, build_reference(settings, networks, policy), tokenizer
        drafts = build_drafting(settings, algorithm.group_size, *models, prompts, reward, cost, phases)
    else:
        build = partial(build_maker, settings, algorithm.group_size, data, policy, reward, cost)
        on_policy = isinstance(settings.sampler, NativeSamplerSettings)
        drafts = Ahead(settings.overlap, networks.policy, build, algorithm.group_size, batches, on_policy, phases)
    sole = settings.epochs == 1 and size * algorithm.rows_per_prompt <= settings.minibatch_size
    return RolloutSource(drafts, networks, algorithm, size, micro, settings.max_weight, sole, phases), batches


def build_maker(
    settings: RLSettings,
    group_size: int,
    data: Path,
    policy: Path,
    reward: Path | None,
    cost: Path | None,
) -> DraftMaker:
    """What makes drafts in a process of its own, with models of its own. Raises InputError as `build_drafting`."""
    torch.manual_seed(settings.seed)
    phases = Phases(measurable_memory())
    model = with_lora(load_policy(policy), settings.lora)
    models = model, policy, build_reference(settings, Networks(model), policy), load_tokenizer(policy)
    prompts = [row.prompt for row in DataDir(data).prompts("train")]
    return DraftMaker(build_drafting(settings, group_size, *models, prompts, reward, cost, phases), model, phases)


def build_drafting(
    settings: RLSettings,
    group_size: int,
    policy: Any,
    base: Path,
    reference: Reference,
    tokenizer: Tokenizer,
    prompts: Sequence[Conversation],
    reward: Path | None,
    cost: Path | None,
    phases: Phases,
) -> Drafting:
    """What makes drafts with the policy, which started from the folder `base`, in this process; `phases` times it.

    Raises InputError as `build_scorer` and `build_sampler`.
    """
    load = scorer_loader(settings, policy, base)
    models = Models(
        build_sampler(settings, policy, tokenizer, phases),
        reference,
        build_scorer(settings.reward_scorer, reward, "reward", load),
        build_scorer(settings.cost_scorer, cost, "cost", load) if "cost" in settings.teachers else None,
        tokenizer,
        settings.generation.temperature,
        settings.compute.dtype,
        phases,
    )
    generation, micro = settings.generation, settings.micro_batch_size
    stream = Stream(prompts, settings.seed)
    return Drafting(models, stream, settings.prompts_per_rollout, group_size, generation.max_prompt_tokens, micro)


def scorer_loader(settings: RLSettings, policy: Any, base: Path) -> Callable[[Path], ModelScorer]:
    """What makes a scorer of a scalar model's folder: as a guest on the policy, which started from `base`, or alone."""
    alone = partial(load_scorer, dtype=settings.frozen_dtype)
    return SharedBackbone(policy, folder_digest(base), alone).load if settings.share_backbone else alone


def _batches(settings: RLSettings, rows: int) -> int:
    """How many batches there are to be from so many prompts or pairs."""
    passes = settings.passes
    return settings.rollouts if passes is None else math.ceil(passes * rows / settings.prompts_per_rollout)


def build_sampler(
    settings: RLSettings, policy: Any, tokenizer: Tokenizer, phases: Phases | None = None
) -> PolicySampler:
    """What samples from the policy, as `rl.sampler` says; `phases` times it.

    Raises InputError when its server cannot be used.
    """
    given = policy, tokenizer.eos_token_id, settings.generation, settings.seed, phases
    if isinstance(settings.sampler, NativeSamplerSettings):
        return NativeSampler(*given)
    from components.generation.vllm import VllmSampler

    return VllmSampler(settings.sampler, *given)


def _pair_source(
    settings: RLSettings,
    algorithm: DPOSettings,
    reference: Reference,
    tokenizer: Tokenizer,
    data: Path,
    policy: Path,
    output: Path | None,
    phases: Phases,
) -> PairSource:
    rows = [row for row in DataDir(data).preferences("train") if row.dimension in algorithm.dimensions]
    if not rows:
        raise InputError(
            f"{data}: no training pairs of rl.algorithm.dimensions [{', '.join(algorithm.dimensions)}]. Give "
            "preprocess.preferences a source with that dimension, or name one the data has."
        )
    generation = settings.generation
    pairs = encode_pairs(rows, tokenizer, generation.max_prompt_tokens, generation.max_new_tokens)
    stream = Stream(pairs, settings.seed)
    seen = min(len(pairs), _batches(settings, len(pairs)) * settings.prompts_per_rollout)
    some = {index: pairs[index] for index in sorted(stream.indices(0, seen))}
    weights = "fp32" if settings.lora.rank else settings.frozen_dtype
    about = {"pairs": pairs_digest(some.values()), "dtype": settings.compute.dtype, "weights": weights}
    kept = None if output is None else Checkpoints.of("reference", about, {"policy": policy}, output, every=0)
    filler = tokenizer.eos_token_id
    logprobs = PairLogprobs(reference, some, filler, settings.micro_batch_size, kept, phases)
    return PairSource(stream, logprobs, filler, settings.prompts_per_rollout)
