"""Reinforcement learning: the SFT policy learns from the reward model, and from the cost model where one is used."""

import logging
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from components import tracking
from components.artifacts import DataDir, Metrics, folder_digest
from components.checkpoints import Checkpoints
from components.errors import InputError
from components.models import policy_card, save_model
from components.monitoring import Monitor
from components.phases import Phases, measurable_memory
from components.ranks import join
from components.rl import algorithms
from components.rl.alerts import rl_monitor
from components.rl.assembly import Folders, build_networks
from components.rl.course import Course
from components.rl.loop import averages, num_updates, train
from components.rl.ptx import Ptx
from components.rl.report import write_report
from components.rl.settings import RLSettings
from components.rl.sources import build_source
from components.tokens import Tokenizer, load_tokenizer
from components.updates import Updater

COUNTED = ("data/samples", "data/tokens", "data/passes", "loss/skipped_updates", "alerts/total")
logger = logging.getLogger(__name__)


def run(
    settings: RLSettings, *, data: Path, policy: Path, reward: Path | None, cost: Path | None, model: Path
) -> Metrics:
    """Train the policy on the training prompts (for dpo, the pairs) in `data`; writes it to `model`.

    Critics start from the reward and the cost model. Returns the metrics averaged over the last tenth of the
    batches. Raises InputError when the algorithm needs a model that is not there, when settings would train another
    distribution than the sampled one, or when there is nothing to learn from.
    """
    ranks = join()
    torch.manual_seed(settings.seed)
    refuse(settings, reward, cost)
    reward, cost = (path if name in settings.teachers else None for name, path in (("reward", reward), ("cost", cost)))
    folders = Folders(data, policy, reward, cost)
    tokenizer = load_tokenizer(policy)
    networks = build_networks(settings, policy, reward, cost)
    algorithm = algorithms.build(settings.algorithm, _all_there_is, settings.generation.max_new_tokens)
    phases = Phases(measurable_memory())
    source, batches = build_source(settings, algorithm, networks, tokenizer, folders, model, phases, ranks)
    critics = dict.fromkeys(("value", "cost_value"), settings.critic_optimizer)
    updates = num_updates(settings, batches, source.rows_per_batch)
    updater = Updater(networks, settings.optimizer, settings.compute, updates, critics, ranks)
    inputs = {name: path for name, path in folders._asdict().items() if path is not None}
    plain = settings.model_dump(mode="json")
    checkpoints = Checkpoints.of("rl", plain, inputs, model, settings.checkpoint_every, settings.keep_checkpoints)
    logger.info("rl: %s, %d batches of %d", settings.algorithm.name, batches, settings.prompts_per_rollout)
    staleness = 0 if settings.overlap is None else settings.overlap.staleness
    monitor = rl_monitor(settings.alerts, settings.compute.dtype, settings.algorithm, staleness)
    extras = [_ptx(settings, data, tokenizer, phases)] if settings.ptx.coef else []
    card = policy_card(folder_digest(policy), "rl", tokenizer)

    def finish(course: Course) -> None:
        _report(plain, course, monitor)
        save_model(networks.policy, tokenizer, model, card, settings=plain, parents=inputs)

    with closing(source):
        course = train(settings, batches, algorithm, source, updater, extras, monitor, checkpoints, finish, phases)
    checkpoints.clear()
    return last_tenth(course)


def _all_there_is(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over processes of what every one of them has from the whole rollout: the tensor itself."""
    return tensor


def _report(settings: dict[str, Any], course: Course, monitor: Monitor) -> None:
    """The page on the whole course, beside the step's other files and with its MLflow run."""
    if (folder := tracking.folder()) is not None:
        history = [(row.update, row.metrics) for row in course.history]
        write_report(folder / "report" / "report.html", settings, history, course.scatter or None, monitor.alerts)
        tracking.log_artifacts(folder / "report")


def last_tenth(course: Course) -> Metrics:
    """Every metric averaged over the last tenth of the batches; what is counted up, as it is at the end."""
    rows = [row.metrics for row in course.history]
    counted = {name: rows[-1][name] for name in COUNTED if name in rows[-1]}
    return averages(rows[-math.ceil(len(rows) / 10) :]) | counted


def refuse(settings: RLSettings, reward: Path | None, cost: Path | None) -> None:
    """Raise InputError for settings that contradict one another or the inputs."""
    name, generation = settings.algorithm.name, settings.generation
    for teacher, scorer, given in (("reward", settings.reward_scorer, reward), ("cost", settings.cost_scorer, cost)):
        if teacher in settings.teachers and scorer.kind in ("model", "ensemble") and given is None:
            raise InputError(
                f"rl.algorithm.name is {name}: it needs a {teacher} model and none was given. Give one, or set "
                f"rl.{teacher}_scorer.kind to function or url."
            )
    if settings.lora.rank and settings.lora.dropout:
        raise InputError(
            f"rl.lora.dropout is {settings.lora.dropout}: the updated policy would differ from the sampled one before "
            "any update. Set it to 0."
        )
    if not settings.teachers:  # nothing is sampled
        return
    if generation.temperature == 0:
        raise InputError(
            "rl.generation.temperature is 0: the policy would never try anything but its likeliest token. "
            "Set it above 0; 1.0 samples the policy as it is."
        )
    if generation.top_p < 1 or generation.top_k:
        raise InputError(
            f"rl.generation has top_p {generation.top_p} and top_k {generation.top_k}: responses would be sampled from "
            "another distribution than the one that is trained. Leave them at 1.0 and 0."
        )


def _ptx(settings: RLSettings, data: Path, tokenizer: Tokenizer, phases: Phases) -> Ptx:
    demonstrations = DataDir(data).demonstrations("train")
    if not demonstrations:
        raise InputError(
            f"{data}: no demonstrations, and rl.ptx.coef is {settings.ptx.coef}. Give preprocess.demonstrations a "
            "source, or set rl.ptx.coef to 0."
        )
    generation = settings.generation
    return Ptx(
        settings.ptx,
        demonstrations,
        tokenizer,
        generation.max_prompt_tokens,
        generation.max_new_tokens,
        settings.seed,
        phases,
    )
