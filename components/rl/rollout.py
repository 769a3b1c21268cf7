"""Where batches come from: prompts are sampled, scored and read by every model that has a say."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from components.artifacts import Metrics
from components.divergence import kl_estimate
from components.generation import Sampler, decode
from components.models import response_logprobs
from components.records import Conversation
from components.rl.functional import masked_mean, masked_sum
from components.rl.networks import PolicyAndValues, in_parts
from components.rl.types import Rollout
from components.scoring import Scorer
from components.tokens import Tokenizer, encode_prompt, pad


@dataclass(frozen=True)
class Models:
    """Everything that is only read during a rollout."""

    networks: PolicyAndValues
    reference: Any
    sampler: Sampler
    reward: Scorer
    cost: Scorer | None
    tokenizer: Tokenizer
    autocast: Callable[[], AbstractContextManager[None]]
    """The arithmetic of training: policy, sampler and reference must not differ by their dtype."""


class PromptStream:
    """Prompts in an endless sequence of shuffled passes that depends on the seed alone."""

    def __init__(self, prompts: Sequence[Conversation], seed: int) -> None:
        self.prompts, self.seed = prompts, seed

    def batch(self, number: int, size: int) -> list[Conversation]:
        """The `size` prompts of batch `number` (0-based)."""
        return [self._at(place) for place in range(number * size, (number + 1) * size)]

    def _at(self, place: int) -> Conversation:
        epoch, index = divmod(place, len(self.prompts))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return self.prompts[int(torch.randperm(len(self.prompts), generator=generator)[index])]


def collect(models: Models, prompts: Sequence[Conversation], group_size: int, max_prompt: int, micro: int) -> Rollout:
    """A rollout of `group_size` responses to each prompt, with log-probabilities recomputed by the trainer.

    The sampler's own log-probabilities come from other kernels (a key-value cache, perhaps another engine);
    the update's ratios must start at 1, so the old policy is what the trainer says it was.
    """
    encoded = [encode_prompt(models.tokenizer, prompt)[-max_prompt:] for prompt in prompts]
    with models.autocast():
        samples = models.sampler.sample(encoded, group_size)
    rows = [index for index in range(len(prompts)) for _ in range(group_size)]
    ids, mask = pad([encoded[index] for index in rows], models.tokenizer.eos_token_id, side="left")
    input_ids = torch.cat([ids.to(samples.ids.device), samples.ids], dim=1)
    attention_mask = torch.cat([mask.to(samples.ids.device), samples.mask], dim=1)
    length = samples.ids.shape[1]
    old = in_parts(lambda i, m: models.networks(i, m, length), micro, input_ids, attention_mask)
    temperature = models.networks.temperature
    with models.autocast():
        reference = in_parts(
            lambda i, m: response_logprobs(models.reference, i, m, length, temperature)[0],
            micro,
            input_ids,
            attention_mask,
        )
    texts = decode(models.tokenizer, samples)
    asked = [prompts[index] for index in rows]
    return Rollout(
        input_ids,
        attention_mask,
        samples.mask,
        logprobs=torch.cat([forward.logprobs for forward in old]).masked_fill(~samples.mask, 0.0),
        ref_logprobs=torch.cat(reference).masked_fill(~samples.mask, 0.0),
        scores=models.reward.score(asked, texts).to(input_ids.device),
        ended=samples.ended,
        costs=None if models.cost is None else models.cost.score(asked, texts).to(input_ids.device),
        values=torch.cat([forward.values for forward in old]),
        cost_values=None if models.cost is None else torch.cat([forward.cost_values for forward in old]),
        group_size=group_size,
    )


def rollout_metrics(rollout: Rollout) -> Metrics:
    """What a rollout says of the policy before it is learned from; KL is summed over each response."""
    num_rows = len(rollout.mask)
    k1, k3 = (
        float(masked_sum(kl_estimate(rollout.logprobs, rollout.ref_logprobs, name), rollout.mask)) / num_rows
        for name in ("k1", "k3")
    )
    metrics = {
        "rollout/kl_k1": k1,
        "rollout/kl_k3": k3,
        "rollout/score": float(rollout.scores.mean()),
        "rollout/score_std": float(rollout.scores.std(unbiased=False)),
        "rollout/length": float(rollout.mask.sum(1).float().mean()),
        "rollout/missing_eos": float((~rollout.ended).float().mean()),
        "rollout/logprob": float(masked_mean(rollout.logprobs, rollout.mask)),
    }
    if rollout.costs is not None:
        metrics["rollout/cost"] = float(rollout.costs.mean())
        metrics["rollout/unsafe"] = float((rollout.costs > 0).float().mean())
    return metrics


class RolloutSource:
    """Rollouts, one after the other, each from the policy as it is when asked for."""

    def __init__(
        self, models: Models, stream: PromptStream, size: int, group_size: int, max_prompt: int, micro: int
    ) -> None:
        self.models, self.stream, self.size = models, stream, size
        self.group_size, self.max_prompt, self.micro = group_size, max_prompt, micro

    def rollouts(self, start: int, stop: int) -> Iterator[Rollout]:
        """The rollouts with these numbers."""
        for number in range(start, stop):
            self.models.networks.eval()
            prompts = self.stream.batch(number, self.size)
            yield collect(self.models, prompts, self.group_size, self.max_prompt, self.micro)
