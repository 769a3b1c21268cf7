"""Drafts of rollouts: prompts are sampled, scored, and read by the reference; the networks under training come later.

So a draft can be made beside the updates, by a process with a copy of the policy.

Shapes: B rows (the responses to one prompt are neighbours), P prompt tokens (padded left), R response tokens (right).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from components.artifacts import Metrics
from components.generation import PolicySampler, decode
from components.models import autocast
from components.phases import Phases
from components.records import Conversation
from components.rl.reference import Reference
from components.rl.stream import Stream
from components.rl.types import State, micro_rows
from components.scoring import Scorer
from components.tokens import Tokenizer, encode_prompt, pad

SAMPLER_STATE = "random.sampler"


@dataclass(frozen=True)
class Draft:
    """Fresh responses and what is said of them by all models that no update changes."""

    input_ids: Tensor
    """(B, P+R)"""
    attention_mask: Tensor
    """(B, P+R), true on prompt and response tokens."""
    mask: Tensor
    """(B, R), true on response tokens, end-of-sequence included."""
    sampled_logprobs: Tensor
    """(B, R) as the sampler gave them."""
    ref_logprobs: Tensor
    """(B, R) under the reference policy."""
    scores: Tensor
    """(B,) of the reward scorer."""
    costs: Tensor | None
    """(B,) of the cost scorer."""
    ended: Tensor
    """(B,), true where the policy ended its response."""
    group_size: int
    """Responses to each prompt."""
    metrics: Metrics
    """What sampler and scorers measured on the way."""


class Drafts(Protocol):
    """Where drafts come from."""

    on_policy: bool
    """Whether the policy as it is samples them, so that nothing has to be corrected."""

    def draft(self, number: int) -> Draft:
        """The draft of rollout `number` (0-based)."""
        ...

    def state(self) -> State:
        """What later drafts depend on, as it is now."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        ...

    def close(self) -> None:
        """End what makes drafts elsewhere."""
        ...


@dataclass(frozen=True)
class Models:
    """Everything that is only read while a draft is made."""

    sampler: PolicySampler
    reference: Reference
    reward: Scorer
    cost: Scorer | None
    tokenizer: Tokenizer
    temperature: float
    """Responses are sampled at it, and the reference is read at it."""
    dtype: str
    """The arithmetic of training: policy and sampler must not differ by it."""
    phases: Phases = field(default_factory=Phases)
    """What times them; the sampler has it too."""


class Drafting:
    """Drafts made when they are asked for, with the policy as it then is."""

    def __init__(
        self, models: Models, stream: Stream[Conversation], size: int, group_size: int, max_prompt: int, micro: int
    ) -> None:
        """`size` prompts each, cut to their last `max_prompt` tokens, with `group_size` responses."""
        self.models, self.stream, self.size, self.group_size = models, stream, size, group_size
        self.max_prompt, self.micro = max_prompt, micro
        self.on_policy = models.sampler.on_policy

    def draft(self, number: int) -> Draft:
        """The draft of rollout `number` (0-based)."""
        prompts = self.stream.batch(number, self.size)
        return drafted(self.models, prompts, self.group_size, self.max_prompt, self.micro)

    def state(self) -> State:
        """The random state of the sampler."""
        state = self.models.sampler.state()
        return lambda: {SAMPLER_STATE: state}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.models.sampler.restore(tensors[SAMPLER_STATE])

    def close(self) -> None:
        """Nothing to end: drafts are made here."""


def drafted(models: Models, prompts: Sequence[Conversation], group_size: int, max_prompt: int, micro: int) -> Draft:
    """`group_size` responses to each prompt; the reference reads as many at once as `micro` of full length take up."""
    encoded = [encode_prompt(models.tokenizer, prompt)[-max_prompt:] for prompt in prompts]
    with autocast(models.dtype):
        samples = models.sampler.sample(encoded, group_size)
    rows = [index for index in range(len(prompts)) for _ in range(group_size)]
    ids, mask = pad([encoded[index] for index in rows], models.tokenizer.eos_token_id, side="left")
    device, length = samples.ids.device, samples.ids.shape[1]
    input_ids = torch.cat([ids.to(device), samples.ids], dim=1)
    attention_mask = torch.cat([mask.to(device), samples.mask], dim=1)
    parts = micro_rows(attention_mask, micro, group_size if group_size <= micro else 1)
    responses, asked = decode(models.tokenizer, samples), [prompts[index] for index in rows]
    tokens = int(attention_mask.sum())
    with models.phases.phase("score", tokens):
        scores = models.reward.score(asked, responses).to(device)
        costs = None if models.cost is None else models.cost.score(asked, responses).to(device)
    with models.phases.phase("reference", tokens):
        ref_logprobs = models.reference.logprobs(input_ids, attention_mask, length, models.temperature, parts)
    return Draft(
        input_ids,
        attention_mask,
        samples.mask,
        samples.logprobs,
        ref_logprobs,
        scores,
        costs,
        samples.ended,
        group_size,
        models.sampler.metrics | models.reward.metrics | ({} if models.cost is None else models.cost.metrics),
    )
