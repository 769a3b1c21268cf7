"""Our decoder against Hugging Face's `generate`: 32 responses of up to 64 tokens to prompts of 64, on the CPU.

    python benchmarks/decoding.py [--size 7m] [--threads 2] [--dtype fp32] [--runs 7] [--clock wall]

Three cases: 32 prompts and 64 new tokens each; the same with lengths that vary as those of real answers do
(geometric, a third of the longest in the mean); and 8 prompts with 4 responses each of such lengths, as in rollouts.
Both sides sample at temperature 1 without truncation, and a response's length is forced from outside: for ours by the
row's random number, for `generate` by a logits processor. They take turns; the table shows each side's median time
and the median of the ratios. On a machine that others use too, one thread and the CPU clock say more.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.base.architecture import SIZES
from components.generation.native import NativeSampler
from components.models import autocast
from components.settings import Generation
from tiny_models import silence

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
VOCABULARY, ROWS, PROMPT, LENGTH = 4096, 32, 64, 64
END = VOCABULARY - 1
"""The last token: inverting the cumulative distribution gives it for a draw of 1, and for no smaller one here."""


class Forced(NativeSampler):
    """Our sampler, every row of which ends when it is told to."""

    def __init__(self, model: Any, lengths: Tensor) -> None:
        super().__init__(model, END, Generation(max_new_tokens=LENGTH, batch_size=ROWS), seed=0)
        self.lengths = lengths

    def draw(self, rows: int) -> Tensor:
        """Draws that end each row at its length, and not before."""
        draws = super().draw(rows) * 0.99
        draws[torch.arange(rows), self.lengths - 1] = 1.0
        return draws


class ForcedEnd:
    """A logits processor for `generate` that does the same."""

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) under which a row ends at its length, and not before."""
        ending = self.lengths == ids.shape[1] - PROMPT + 1
        scores[:, END] = torch.where(ending, scores.new_tensor(1e4), float("-inf"))
        return scores


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    silence()
    torch.set_num_threads(options.threads)
    model = build(options.size)
    print(f"{options.size} {options.dtype}, {options.threads} threads, {processor()}, torch {torch.__version__}")
    print(f"{'prompts':7} {'lengths':10} {'tokens':>6} {'generate':>10} {'ours':>10} {'times as fast':>14}")
    longest = torch.full((ROWS,), LENGTH)
    cases = ((ROWS, "all 64", longest), (ROWS, "geometric", geometric()), (8, "geometric", geometric()))
    for prompts, name, lengths in cases:
        with autocast(options.dtype):
            theirs, ours = alternate(model, prompts, lengths, options.runs, CLOCKS[options.clock])
        ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
        seconds = f"{statistics.median(theirs):8.3f} s {statistics.median(ours):8.3f} s"
        print(f"{prompts:7} {name:10} {int(lengths.sum()):6} {seconds} {ratio:14.2f}", flush=True)


def build(size: Any) -> Any:
    """A random Llama of a size that plumbline makes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, kv_heads, feed_forward = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=feed_forward,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config).eval()


def geometric() -> Tensor:
    """Lengths (B,) whose longest is LENGTH and whose mean is close to a third of it."""
    draws = torch.rand(ROWS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    lengths = (draws.log() / torch.tensor(1 - 3 / LENGTH, dtype=torch.float64).log()).ceil()
    return (lengths * LENGTH / lengths.max()).ceil().long()


def alternate(
    model: Any, num_prompts: int, lengths: Tensor, runs: int, clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Seconds of `generate` and of ours, in turns, after one warm-up each."""
    prompts = torch.randint(0, END, (num_prompts, PROMPT), generator=torch.Generator().manual_seed(1))
    rows, k = prompts.tolist(), ROWS // num_prompts
    sampler = Forced(model, lengths)

    def ours() -> Tensor:
        return sampler.sample(rows, k).mask.sum(1)

    def theirs() -> Tensor:
        ids = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            num_return_sequences=k,
            max_new_tokens=LENGTH,
            eos_token_id=END,
            pad_token_id=END,
            logits_processor=[ForcedEnd(lengths)],
        )
        found: Tensor = (ids[:, PROMPT:] != END).sum(1) + 1
        return found

    timed = [(seconds(theirs, lengths, clock), seconds(ours, lengths, clock)) for _ in range(runs + 1)][1:]
    return [pair[0] for pair in timed], [pair[1] for pair in timed]


def seconds(side: Callable[[], Tensor], lengths: Tensor, clock: Callable[[], float]) -> float:
    """Time of one call, which must have given responses of these lengths."""
    start = clock()
    found = side()
    taken = clock() - start
    assert torch.equal(found, lengths), "a side did not decode what it was to"
    return taken


def processor() -> str:
    """The machine's processor as the system names it."""
    told = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in told if line.startswith("model name"))
    return next(names, platform.machine())


if __name__ == "__main__":
    main()
