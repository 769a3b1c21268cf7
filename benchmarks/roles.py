"""One measurement of memory.py: a step with adapters, alone in its process; its peak memory as one line of JSON.

    python benchmarks/roles.py make FOLDER [--size 7m]
    python benchmarks/roles.py {sft,shared,critics,separate,halved} FOLDER [--size 7m] [--dtype fp32] [--checkpointing]

`make` writes models and data into FOLDER. sft is supervised fine-tuning. The others are PPO-Lag, whose reference is
the policy without its adapters: with reward, cost and both critics on the policy's backbone (shared); with the critics
alone on it (critics); with four models of their own (separate), of which reward and cost are held in bf16 (halved).

All of them learn from 32 rows of 64 prompt and 64 response tokens in an update, and take 16 at a time through the model
and through the sampler.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import accelerate  # noqa: F401  what every step loads is loaded before memory is first measured
import peft  # noqa: F401
import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401

import workload
from components.artifacts import DataDir, ModelCard, folder_digest
from components.base.architecture import train_tokenizer, untrained_llama
from components.models import policy_card, save_model, scalar_from_policy, with_lora
from components.phases import ResidentMemory
from components.records import Demonstration, Message, Prompt, content_id, prompt_text
from components.rl import step as rl
from components.rl.algorithm_settings import PPOLagSettings
from components.rl.settings import RLSettings
from components.settings import Compute, Generation, Lora, Training
from components.sft import step as sft
from components.sft.settings import SFTSettings
from components.tokens import encode_response, template_digest
from measurement import STANDARD, peak_mb

LORA, LOAD = Lora(rank=8), STANDARD
STEPS = 2
"""Updates of sft, and rollouts of PPO-Lag with one update each."""
SHARING = {"shared": {"share_backbone": True}, "critics": {"share_backbone": True}, "separate": {},
           "halved": {"frozen_dtype": "bf16"}}  # fmt: skip


def make(folder: Path, size: str) -> None:
    """Write the models of one size, and the data, the same for every size."""
    pairs = workload.made_up(random.Random(0), workload.VOCABULARY, LOAD.max_length)
    texts = (text for row in pairs for text in (prompt_text(row.prompt), row.chosen, row.rejected))
    tokenizer = train_tokenizer(texts, workload.VOCABULARY)
    torch.manual_seed(0)
    policy = folder / size / "policy"
    network: Any = untrained_llama(size, tokenizer, max_positions=1024)  # type: ignore[arg-type]
    save_model(network, tokenizer, policy, policy_card("", "base", tokenizer), settings={}, parents={})
    for kind in ("reward", "cost"):
        for name, lora in ((kind, LORA), (f"{kind}-whole", Lora())):
            scalar = scalar_from_policy(policy)
            nn.init.normal_(scalar.model.score.weight)
            card = ModelCard(kind, folder_digest(policy), kind, template_digest(tokenizer))
            model = with_lora(scalar.model, lora, task_type="SEQ_CLS")
            save_model(model, tokenizer, folder / size / name, card, settings={}, parents={})
    asked = list(workload.full_prompts(pairs, tokenizer, LOAD.prompt_tokens))[: STEPS * LOAD.responses]
    prompts = [Prompt(content_id(text), (Message("user", text),), "benchmark") for text in asked]
    shown = [
        Demonstration(row.id, row.prompt, answer, "benchmark")
        for row, answer in zip(prompts, answers(pairs, tokenizer), strict=False)
    ]
    DataDir.write(folder / "data", {("demonstrations", "train"): shown, ("prompts", "train"): prompts}, {}, {})


def answers(pairs: Any, tokenizer: Any) -> Iterator[str]:
    """Texts of exactly as many tokens as a response has, the end-of-sequence token included."""
    for row in pairs:
        ids = encode_response(tokenizer, f"{row.chosen} {row.rejected}", ended=False)
        text = tokenizer.decode(ids[: LOAD.response_tokens - 1])
        if len(encode_response(tokenizer, text)) == LOAD.response_tokens:
            yield text


def run(what: str, folder: Path, size: str, compute: Compute, model: Path) -> None:
    """The pipeline's step, as the pipeline runs it, into the folder `model`."""
    models, data = folder / size, folder / "data"
    tokens = LOAD.prompt_tokens + LOAD.response_tokens
    if what == "sft":
        parts = LOAD.responses // LOAD.rows
        training = Training(
            batch_tokens=LOAD.rows * tokens, accumulation=parts, max_length=tokens, compute=compute
        )
        sft.run(SFTSettings(training=training, lora=LORA), data=data, base=models / "policy", model=model)
        return
    settings = RLSettings(
        algorithm=PPOLagSettings(),
        rollouts=STEPS,
        prompts_per_rollout=LOAD.responses,
        minibatch_size=LOAD.responses,
        micro_batch_size=LOAD.rows,
        generation=Generation(
            max_prompt_tokens=LOAD.prompt_tokens, max_new_tokens=LOAD.response_tokens, batch_size=LOAD.rows
        ),
        lora=LORA,
        compute=compute,
        **SHARING[what],  # type: ignore[arg-type]
    )
    reward, cost = (models / (name if what == "shared" else f"{name}-whole") for name in ("reward", "cost"))
    rl.run(settings, data=data, policy=models / "policy", reward=reward, cost=cost, model=model)


def main() -> None:
    """Make or measure, as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("make", "sft", *SHARING))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="7m")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    given = parser.parse_args()
    if given.what == "make":
        make(given.folder, given.size)
        return
    compute = Compute(dtype=given.dtype, gradient_checkpointing=given.checkpointing)
    before = peak_mb()
    # phases would start over the peak of resident memory, which is read at the end
    over = patch.object(ResidentMemory, "peak", side_effect=OSError)
    with TemporaryDirectory(prefix="plumbline-") as scratch, over:
        run(given.what, given.folder, given.size, compute, Path(scratch) / "model")
    print(json.dumps({"peak_mb": peak_mb(), "growth_mb": peak_mb() - before}))


if __name__ == "__main__":
    main()
