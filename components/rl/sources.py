"""Where the batches of a run come from: drafts made here or in a process of their own, or labelled pairs."""

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
from components.models import load_policy, with_lora
from components.phases import Phases, measurable_memory
from components.ranks import ALONE, Ranks
from components.records import Conversation
from components.rl.ahead import Ahead, DraftMaker
from components.rl.algorithm_settings import DPOSettings
from components.rl.algorithms.dpo import DPO
from components.rl.assembly import Folders, build_reference
from components.rl.drafts import Drafting, Drafts, Models
from components.rl.networks import Networks
from components.rl.pairs import PairLogprobs, PairSource, encode_pairs, pairs_digest
from components.rl.reference import Reference
from components.rl.rollout import RolloutSource
from components.rl.settings import RLSettings
from components.rl.shares import shared
from components.rl.stream import Stream
from components.rl.types import Algorithm, Source
from components.scoring import ModelScorer, SharedBackbone, build_scorer, load_scorer
from components.settings import NativeSamplerSettings
from components.tokens import Tokenizer, load_tokenizer


def build_source(
    settings: RLSettings,
    algorithm: Algorithm | DPO,
    networks: Networks,
    tokenizer: Tokenizer,
    folders: Folders,
    output: Path | None = None,
    phases: Phases | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Source, int]:
    """Where batches come from, and how many there are to be; `phases` times their making, by all `ranks` together.

    What the reference says of labelled pairs is kept where the checkpoints of `output` are. Raises InputError when
    there are no training prompts (for dpo, no training pairs).
    """
    phases = phases or Phases()
    if isinstance(settings.algorithm, DPOSettings):
        reference = partial(build_reference, settings, networks.policy, folders.policy)
        pairs = _pair_source(settings, settings.algorithm, reference, tokenizer, folders, output, phases, ranks)
        return pairs, _batches(settings, len(pairs.stream.rows))
    assert not isinstance(algorithm, DPO)
    prompts = _prompts(folders.data)
    batches, size, micro = _batches(settings, len(prompts)), settings.prompts_per_rollout, settings.micro_batch_size
    drafts: Drafts
    if settings.overlap is None:
        given = tokenizer, prompts, folders, phases, ranks
        drafts = build_drafting(settings, algorithm.group_size, networks.policy, *given)
    else:
        build = partial(build_maker, settings, algorithm.group_size, folders)
        on_policy = isinstance(settings.sampler, NativeSamplerSettings)
        drafts = Ahead(settings.overlap, networks.policy, build, algorithm.group_size, batches, on_policy, phases)
    sole = settings.epochs == 1 and size * algorithm.rows_per_prompt <= settings.minibatch_size
    return RolloutSource(drafts, networks, algorithm, size, micro, settings.max_weight, sole, phases, ranks), batches


def build_maker(settings: RLSettings, group_size: int, folders: Folders) -> DraftMaker:
    """What makes drafts in a process of its own, with models of its own. Raises InputError as `build_drafting`."""
    torch.manual_seed(settings.seed)
    phases = Phases(measurable_memory())
    policy, tokenizer = with_lora(load_policy(folders.policy), settings.lora), load_tokenizer(folders.policy)
    prompts = _prompts(folders.data)
    return DraftMaker(
        build_drafting(settings, group_size, policy, tokenizer, prompts, folders, phases), policy, phases
    )


def build_drafting(
    settings: RLSettings,
    group_size: int,
    policy: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Conversation],
    folders: Folders,
    phases: Phases,
    ranks: Ranks = ALONE,
) -> Drafting:
    """What makes drafts with the policy, in this process and all `ranks` beside it; `phases` times it.

    Raises InputError as `build_scorer` and `build_sampler`.
    """
    load = scorer_loader(settings, policy, folders.policy, ranks)
    models = Models(
        build_sampler(settings, policy, tokenizer, phases, ranks),
        build_reference(settings, policy, folders.policy),
        build_scorer(settings.reward_scorer, folders.reward, "reward", load),
        build_scorer(settings.cost_scorer, folders.cost, "cost", load) if "cost" in settings.teachers else None,
        tokenizer,
        settings.generation.temperature,
        settings.compute.dtype,
        phases,
    )
    generation, micro = settings.generation, settings.micro_batch_size
    stream = Stream(prompts, settings.seed)
    models = shared(models, policy, ranks)
    return Drafting(models, stream, settings.prompts_per_rollout, group_size, generation.max_prompt_tokens, micro)


def _prompts(data: Path) -> list[Conversation]:
    prompts = [row.prompt for row in DataDir(data).prompts("train")]
    if not prompts:
        raise InputError(f"{data}: no training prompts; give preprocess.prompts a source.")
    return prompts


def scorer_loader(
    settings: RLSettings, policy: Any, base: Path, ranks: Ranks = ALONE
) -> Callable[[Path], ModelScorer]:
    """What makes a scorer of a scalar model's folder: as a guest on the policy, which started from `base`, or alone."""
    alone = partial(load_scorer, dtype=settings.frozen_dtype, ranks=ranks)
    return SharedBackbone(policy, folder_digest(base), alone, ranks).load if settings.share_backbone else alone


def _batches(settings: RLSettings, rows: int) -> int:
    """How many batches there are to be from so many prompts or pairs."""
    passes = settings.passes
    return settings.rollouts if passes is None else math.ceil(passes * rows / settings.prompts_per_rollout)


def build_sampler(
    settings: RLSettings, policy: Any, tokenizer: Tokenizer, phases: Phases | None = None, ranks: Ranks = ALONE
) -> PolicySampler:
    """What samples from the policy, as `rl.sampler` says; `phases` times it, and `ranks` hold the policy.

    Raises InputError when its server cannot be used.
    """
    given = policy, tokenizer.eos_token_id, settings.generation, settings.seed, phases
    if isinstance(settings.sampler, NativeSamplerSettings):
        return NativeSampler(*given)
    from components.generation.vllm import VllmSampler

    return VllmSampler(settings.sampler, *given, ranks=ranks)


def _pair_source(
    settings: RLSettings,
    algorithm: DPOSettings,
    reference: Callable[[], Reference],
    tokenizer: Tokenizer,
    folders: Folders,
    output: Path | None,
    phases: Phases,
    ranks: Ranks,
) -> PairSource:
    rows = [row for row in DataDir(folders.data).preferences("train") if row.dimension in algorithm.dimensions]
    if not rows:
        raise InputError(
            f"{folders.data}: no training pairs of rl.algorithm.dimensions [{', '.join(algorithm.dimensions)}]. Give "
            "preprocess.preferences a source with that dimension, or name one the data has."
        )
    generation = settings.generation
    pairs = encode_pairs(rows, tokenizer, generation.max_prompt_tokens, generation.max_new_tokens)
    stream = Stream(pairs, settings.seed)
    seen = min(len(pairs), _batches(settings, len(pairs)) * settings.prompts_per_rollout)
    some = {index: pairs[index] for index in sorted(stream.indices(0, seen))}
    weights = "fp32" if settings.lora.rank else settings.frozen_dtype
    about = {"pairs": pairs_digest(some.values()), "dtype": settings.compute.dtype, "weights": weights}
    kept = None if output is None else Checkpoints.of("reference", about, {"policy": folders.policy}, output, every=0)
    filler = tokenizer.eos_token_id
    logprobs = PairLogprobs(reference, some, filler, settings.micro_batch_size, kept, phases, ranks)
    return PairSource(stream, logprobs, filler, settings.prompts_per_rollout)
