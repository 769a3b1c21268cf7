"""Our engine on the workload: seconds of every step and memory, as one line of JSON.

    python benchmarks/ours.py {rloo,grpo,online_dpo,dpo,dpo_later,reward,sft} FOLDER [--size 7m] [--dtype fp32]

FOLDER is what workload.py made. The steps sft, reward and rl run as the pipeline runs them, only with these settings,
up to the saving of the model. A step ends where its numbers go to tracking. One update learns from what was just
sampled, once, as in TRL's trainers; rollouts and pairs are read 16 rows at a time, the default of
`rl.micro_batch_size`, unless --micro says otherwise.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import accelerate  # noqa: F401  loaded before memory is first measured, as the peer's libraries are
import torch

import absent  # noqa: F401  first: it stands in for libraries that are missing
from components import tracking
from components.artifacts import read_json
from components.phases import ResidentMemory
from components.reward import step as reward
from components.reward.settings import RewardSettings
from components.rl import step as rl
from components.rl.algorithm_settings import (
    AlgorithmSettings,
    DPOSettings,
    GRPOSettings,
    OnlineDPOSettings,
    RLOOSettings,
)
from components.rl.settings import RLSettings
from components.settings import Compute, Generation, Optimizer, Training
from components.sft import step as sft
from components.sft.settings import SFTSettings
from measurement import KL_COEF, LEARNING_RATE, Measurement, Task, stopwatch

ONLINE: dict[str, AlgorithmSettings] = {
    "rloo": RLOOSettings(group_size=4, kl_coef=KL_COEF),
    "grpo": GRPOSettings(group_size=4, kl_coef=KL_COEF),
    "online_dpo": OnlineDPOSettings(group_size=2, beta=KL_COEF),
}


def measure(task: Task) -> Measurement:
    """Train for the task's steps; the model that comes out is not saved."""
    watch = stopwatch(task.device)
    log_metrics = tracking.log_metrics

    def logged(metrics: Mapping[str, float], update: int) -> tracking.Row:
        watch.lap()
        if task.what == "dpo":  # the reference reads all pairs in the first step, which is not measured
            watch.ahead_s += metrics.get("perf/reference_s", 0.0)
        watch.lengths += [metrics["rollout/length"]] if "rollout/length" in metrics else []
        return log_metrics(metrics, update)

    with TemporaryDirectory(prefix="plumbline-") as scratch, ExitStack() as patches:
        patches.enter_context(patch.object(tracking, "log_metrics", logged))
        # phases would start over the peak of resident memory, which is read at the end
        patches.enter_context(patch.object(ResidentMemory, "peak", side_effect=OSError))
        for step in (sft, reward, rl):
            patches.enter_context(patch.object(step, "save_model"))
        run(task, Path(scratch) / "model")
    return watch.result(task, torch.get_num_threads())


def run(task: Task, model: Path) -> None:
    """The pipeline's step for the task, into the folder `model`."""
    policy, data = task.model / "policy", task.folder / ("pass" if task.what == "dpo_later" else "whole")
    if task.what in ONLINE:
        settings = online(task)
        rl.run(settings, data=data, policy=policy, reward=task.model / "reward", cost=None, model=model)
    elif task.what in ("dpo", "dpo_later"):
        rl.run(pairs(task), data=data, policy=policy, reward=None, cost=None, model=model)
    elif task.what == "reward":
        reward_settings = RewardSettings(training=training(task, "pair_budget", task.load.pair_parts), normalize=False)
        reward.run(reward_settings, data=data, sft=policy, model=model)
    else:
        sft.run(SFTSettings(training=training(task, "sft_budget")), data=data, base=policy, model=model)


def online(task: Task) -> RLSettings:
    """Settings for what samples: one update on the responses of a step."""
    algorithm: Any = ONLINE[task.what]
    load = task.load
    return RLSettings(
        algorithm=algorithm,
        rollouts=task.updates,
        prompts_per_rollout=load.responses // algorithm.group_size,
        minibatch_size=load.responses,
        micro_batch_size=load.micro,
        generation=Generation(
            max_prompt_tokens=load.prompt_tokens, max_new_tokens=load.response_tokens, batch_size=load.decoded
        ),
        optimizer=Optimizer(lr=LEARNING_RATE),
        compute=Compute(dtype=task.dtype),
        frozen_dtype=task.dtype,
    )


def pairs(task: Task) -> RLSettings:
    """Settings for dpo: none of the pairs is cut."""
    load = task.load
    return RLSettings(
        algorithm=DPOSettings(),
        rollouts=task.updates,
        prompts_per_rollout=load.rows,
        minibatch_size=2 * load.rows,
        micro_batch_size=load.micro,
        generation=Generation(max_prompt_tokens=load.max_length, max_new_tokens=load.max_length),
        optimizer=Optimizer(lr=LEARNING_RATE),
        compute=Compute(dtype=task.dtype),
        frozen_dtype=task.dtype,
    )


def training(task: Task, budget: str, parts: int = 1) -> Training:
    """Settings for supervised training: one pass, in as many updates as there are steps, of so many micro-batches."""
    return Training(
        batch_tokens=read_json(task.folder / "about.json")[budget],
        accumulation=parts,
        max_length=task.load.max_length,
        optimizer=Optimizer(lr=LEARNING_RATE),
        compute=Compute(dtype=task.dtype),
    )


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Task.parse((__doc__ or "").partition("\n")[0])))))
