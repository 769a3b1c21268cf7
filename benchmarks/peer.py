"""TRL's trainers on the workload: seconds of every step and memory, as one line of JSON.

    python benchmarks/peer.py {rloo,grpo,online_dpo,dpo,dpo_later,reward,sft} FOLDER [--size 7m] [--dtype fp32]

FOLDER is what workload.py made; the texts, tokens, weights and lengths are those that ours learns from. The trainers
stand as their documentation sets them up, with its defaults for all that the workload leaves open: so dpo computes the
reference's log-probabilities in every step (`precompute_ref_log_probs` is off), and a step's rows go through the model
at once. Needs trl, which is in the dev extra.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from measurement import KL_COEF, LEARNING_RATE, Measurement, Stopwatch, Task, stopwatch


class Laps(TrainerCallback):
    """Tells the stopwatch where steps end, and how long responses were where the trainer logs it."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step has ended."""
        self.watch.lap()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer logs once, at the end."""
        if "completions/mean_length" in kwargs["logs"]:
            self.watch.lengths.append(kwargs["logs"]["completions/mean_length"])


def measure(task: Task) -> Measurement:
    """Train for the task's steps."""
    watch = stopwatch(task.device)
    torch.manual_seed(0)
    with TemporaryDirectory(prefix="plumbline-") as scratch:
        trainer = TRAINERS[task.what](task, arguments(task, scratch), [Laps(watch)])
        trainer.train()
    return watch.result(task, torch.get_num_threads())


def arguments(task: Task, scratch: str) -> dict[str, Any]:
    """What every trainer's config is given."""
    return {
        "output_dir": scratch,
        "max_steps": task.updates,
        "learning_rate": LEARNING_RATE,
        "use_cpu": task.device == "cpu",
        "bf16": task.dtype == "bf16",
        "gradient_checkpointing": False,
        "logging_steps": task.updates,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def rows(task: Task, name: str) -> list[dict[str, str]]:
    """The texts of a file of the workload."""
    found: list[dict[str, str]] = json.loads((task.folder / f"{name}.json").read_text())
    return found


def sft(task: Task, common: dict[str, Any], callbacks: list[Any]) -> Any:
    """The loss is that of the responses alone, as with ours."""
    answers = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows(task, "whole")]
    config = trl.SFTConfig(per_device_train_batch_size=task.load.rows, max_length=task.load.max_length, **common)
    return trl.SFTTrainer(
        str(task.model / "policy"), args=config, train_dataset=Dataset.from_list(answers), callbacks=callbacks
    )


def reward(task: Task, common: dict[str, Any], callbacks: list[Any]) -> Any:
    """From the policy with a new head, as with ours."""
    config = trl.RewardConfig(per_device_train_batch_size=task.load.rows, max_length=task.load.max_length, **common)
    return trl.RewardTrainer(
        str(task.model / "policy"),
        args=config,
        train_dataset=Dataset.from_list(rows(task, "whole")),
        callbacks=callbacks,
    )


def dpo(task: Task, common: dict[str, Any], callbacks: list[Any]) -> Any:
    """The reference is a copy that the trainer makes of the policy."""
    config = trl.DPOConfig(per_device_train_batch_size=task.load.rows, max_length=task.load.max_length, **common)
    pairs = rows(task, "pass" if task.what == "dpo_later" else "whole")
    return trl.DPOTrainer(
        str(task.model / "policy"), args=config, train_dataset=Dataset.from_list(pairs), callbacks=callbacks
    )


def policy_gradient(task: Task, common: dict[str, Any], callbacks: list[Any]) -> Any:
    """RLOO or GRPO: four responses to a prompt, one update on them."""
    kind = task.what.upper()
    config = getattr(trl, f"{kind}Config")(
        per_device_train_batch_size=task.load.responses,
        num_generations=4,
        max_completion_length=task.load.response_tokens,
        beta=KL_COEF,
        temperature=1.0,
        **common,
    )
    folder = str(task.model / "reward")
    return getattr(trl, f"{kind}Trainer")(
        str(task.model / "policy"),
        reward_funcs=AutoModelForSequenceClassification.from_pretrained(folder),
        reward_processing_classes=AutoTokenizer.from_pretrained(folder),
        args=config,
        train_dataset=Dataset.from_list(rows(task, "prompts")),
        callbacks=callbacks,
    )


def online_dpo(task: Task, common: dict[str, Any], callbacks: list[Any]) -> Any:
    """Two responses to a prompt."""
    config = OnlineDPOConfig(
        per_device_train_batch_size=task.load.responses // 2,
        max_new_tokens=task.load.response_tokens,
        beta=KL_COEF,
        temperature=1.0,
        **common,
    )
    folder, policy = str(task.model / "reward"), str(task.model / "policy")
    return OnlineDPOTrainer(
        AutoModelForCausalLM.from_pretrained(policy),
        reward_funcs=AutoModelForSequenceClassification.from_pretrained(folder),
        reward_processing_classes=AutoTokenizer.from_pretrained(folder),
        args=config,
        train_dataset=Dataset.from_list(rows(task, "prompts")),
        processing_class=AutoTokenizer.from_pretrained(policy),
        callbacks=callbacks,
    )


TRAINERS: dict[str, Callable[[Task, dict[str, Any], list[Any]], Any]] = {
    "rloo": policy_gradient,
    "grpo": policy_gradient,
    "online_dpo": online_dpo,
    "dpo": dpo,
    "dpo_later": dpo,
    "reward": reward,
    "sft": sft,
}

if __name__ == "__main__":
    print(json.dumps(asdict(measure(Task.parse((__doc__ or "").partition("\n")[0])))))
