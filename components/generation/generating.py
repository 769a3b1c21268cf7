"""Decoding with Hugging Face's `generate`, for architectures that the fast forward pass does not know."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from components.generation.transcript import Transcript
from components.phases import Phases
from components.tokens import pad

FILLER = 0
"""Under a false mask, and after a row's end: any token of the vocabulary."""


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    k: int,
    transcript: Transcript,
    ends: Sequence[int],
    batch_size: int,
    finished: Callable[[int], None],
    phases: Phases,
) -> None:
    """Fill the transcript with `k` responses to each prompt, `batch_size` rows at once, shortest prompts first.

    `generate` runs the model and its cache; which token comes next is the transcript's choice, as everywhere. The
    model's own defaults for sampling (a repetition penalty, say) are left out: the trainer knows of none.
    """
    from transformers import GenerationConfig

    base = model.get_base_model() if hasattr(model, "peft_config") else model
    device = next(base.parameters()).device
    own = base.generation_config
    plain = {"do_sample": False, "eos_token_id": list(ends), "pad_token_id": FILLER}
    rows = sorted(range(transcript.num_rows), key=lambda row: len(prompts[row // k]))
    base.generation_config = GenerationConfig(**plain)
    try:
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            ids, mask = (tensor.to(device) for tensor in pad([prompts[row // k] for row in chosen], FILLER, "left"))
            with ExitStack() as reading:
                reading.enter_context(phases.phase("prefill", int(mask.sum())))
                base.generate(
                    ids,
                    attention_mask=mask.long(),
                    generation_config=GenerationConfig(max_new_tokens=transcript.length, **plain),
                    logits_processor=[_Dictate(transcript, torch.tensor(chosen, device=device), reading.close)],
                )
            finished(len(chosen))
    finally:
        base.generation_config = own


class _Dictate:
    """A logits processor that leaves `generate`, which takes the likeliest token, the transcript's choice alone."""

    def __init__(self, transcript: Transcript, rows: Tensor, begin: Callable[[], None]) -> None:
        """`begin` is called when the prompts have been read, and at every later token again."""
        self.transcript, self.rows, self.begin = transcript, rows, begin

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) in which only the chosen token is finite; rows that are over keep theirs."""
        self.begin()
        going = (~self.transcript.over(self.rows)).nonzero().squeeze(1)
        if not len(going):  # `generate` may look for the end a step late
            return scores
        tokens, _ = self.transcript.extend(self.rows[going], scores[going])
        scores[going] = float("-inf")
        scores[going, tokens] = 0.0
        return scores
