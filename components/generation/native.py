"""Our decoder: prompts read once, a key-value cache taken once, rows that are over replaced by waiting ones.

Sampling and the sampled token's log-probability come from the same float32 softmax, so that what the trainer
later calls the old policy is the distribution that was really sampled.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from components.artifacts import Metrics
from components.generation import Samples
from components.generation.families import is_known
from components.generation.generating import generate
from components.generation.llama import Llama
from components.generation.slots import Slots, WaitingList
from components.generation.transcript import Transcript
from components.models import end_ids
from components.phases import Phases
from components.settings import Generation

logger = logging.getLogger(__name__)


class NativeSampler:
    """Samples from a Hugging Face causal model in this process."""

    on_policy = True

    def __init__(
        self, model: Any, eos_token_id: int, generation: Generation, seed: int, phases: Phases | None = None
    ) -> None:
        self.phases = phases or Phases()
        self.model, self.eos, self.generation = model, eos_token_id, generation
        self.ends = end_ids(model, eos_token_id)
        self.generator = torch.Generator().manual_seed(seed)
        self.metrics: Metrics = {}

    def state(self) -> Tensor:
        """The state of the random generator."""
        return self.generator.get_state()

    def restore(self, state: Tensor) -> None:
        """Take back what `state` gave."""
        self.generator.set_state(state)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Sequence[int]], k: int = 1, finished: Callable[[int], None] = lambda rows: None
    ) -> Samples:
        """`k` responses to each prompt; a row depends on its own prompt, its place and the generator's state alone.

        At most `generation.batch_size` rows are decoded at once; which ones, and when they end, changes nothing.
        `finished` is told how many rows came to their end.
        """
        assert prompts and all(prompts), "a response continues at least one token"
        draws = self.draw(len(prompts) * k).to(self.model.device)
        transcript = Transcript(draws, self.generation, self.ends, self.eos)
        was_training = self.model.training
        self.model.eval()
        try:
            with self.phases.phase("decode"):
                self._fill(transcript, prompts, k, finished)
        finally:
            self.model.train(was_training)
        samples = transcript.samples()
        self.phases.count("decode", int(samples.mask.sum()))
        return samples

    def draw(self, rows: int) -> Tensor:
        """Uniform numbers (rows, max_new_tokens) in [0, 1): all that is random about the rows."""
        return torch.rand((rows, self.generation.max_new_tokens), generator=self.generator)

    def _fill(
        self, transcript: Transcript, prompts: Sequence[Sequence[int]], k: int, finished: Callable[[int], None]
    ) -> None:
        at_once = min(self.generation.batch_size, transcript.num_rows)
        if not is_known(self.model):
            _say_unknown(type(self.model).__name__)
            generate(self.model, prompts, k, transcript, self.ends, at_once, finished, self.phases)
            return
        positions, dtype = max(map(len, prompts)) + transcript.length, _matrix_dtype(self.model)
        with torch.autocast(self.model.device.type, enabled=False):  # from here on dtypes are stated
            with self.phases.phase("weights"):
                llama = Llama(self.model, positions, dtype)
            Slots(llama, WaitingList(llama, prompts, k, self.phases), transcript, at_once, finished).run()


def _matrix_dtype(model: Any) -> torch.dtype:
    """What linear layers compute in: autocast's dtype where it is on, as in training, else the parameters'."""
    kind = model.device.type
    dtype: torch.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    return dtype


@cache
def _say_unknown(architecture: str) -> None:
    """Once per architecture and process."""
    logger.warning("%s is decoded by transformers' generate: our own forward pass does not know it.", architecture)
