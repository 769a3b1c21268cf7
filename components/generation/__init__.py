"""Sampling responses: what a sampler gives back, and the one-call form that evaluation and inference use.

Shapes: B rows (prompt-major: the k samples of one prompt are neighbours), R response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from components.artifacts import Metrics
from components.records import Conversation
from components.settings import Generation

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """What came out of the policy."""

    ids: "Tensor"
    """Token ids (B, R); filler under a false mask."""
    mask: "Tensor"
    """(B, R), true on response tokens, the end-of-sequence token included."""
    logprobs: "Tensor"
    """(B, R) log-probabilities under the distribution that was sampled; 0 under a false mask."""
    ended: "Tensor"
    """(B,), true where the end-of-sequence token was sampled."""


class Sampler(Protocol):
    """Anything that continues token sequences: our decoder, a server, another process."""

    def sample(self, prompts: Sequence[Sequence[int]], k: int = 1) -> Samples:
        """`k` responses to each prompt (token ids), in the prompts' order."""
        ...


class PolicySampler(Sampler, Protocol):
    """A sampler of the policy under training, as it is at every call; one that goes on where it was stopped."""

    on_policy: bool
    """Whether its log-probabilities are the trainer's but for rounding, so that nothing has to be corrected."""
    metrics: Metrics
    """What is worth logging of the latest call."""

    def state(self) -> "Tensor":
        """What the random choices of later calls depend on."""
        ...

    def restore(self, state: "Tensor") -> None:
        """Take back what `state` gave."""
        ...


@dataclass(frozen=True)
class Response:
    """A decoded response."""

    text: str
    ids: tuple[int, ...]
    """Sampled tokens, the end-of-sequence token included."""
    ended: bool
    """Whether the policy ended it; a response cut at the limit did not end."""

    @property
    def num_tokens(self) -> int:
        """Sampled tokens, the end-of-sequence token included."""
        return len(self.ids)


def decode(tokenizer: Any, samples: Samples) -> list[Response]:
    """The samples as text, row by row."""
    from components.tokens import decode_response

    responses = []
    for ids, mask, ended in zip(samples.ids, samples.mask, samples.ended, strict=True):
        tokens = ids[mask].tolist()
        responses.append(Response(decode_response(tokenizer, tokens), tuple(tokens), bool(ended)))
    return responses


def respond(
    model: Any, tokenizer: Any, prompts: Sequence[Conversation], generation: Generation, seed: int
) -> list[Response]:
    """One response to each conversation, in the conversations' order."""
    from components.generation.native import NativeSampler
    from components.progress import Progress
    from components.tokens import encode_prompt

    sampler = NativeSampler(model, tokenizer.eos_token_id, generation, seed)
    encoded = [encode_prompt(tokenizer, prompt)[-generation.max_prompt_tokens :] for prompt in prompts]
    if not encoded:
        return []
    progress = Progress("responses", len(encoded))
    return decode(tokenizer, sampler.sample(encoded, finished=progress.advance))
