"""Rollouts: prompts are sampled, scored and read by every model that has a say."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from components.artifacts import Metrics
from components.divergence import kl_estimate
from components.generation import PolicySampler, decode
from components.models import autocast
from components.records import Conversation
from components.rl.functional import masked_mean, masked_sum
from components.rl.importance import gap_metrics, importance_weights, weight_metrics
from components.rl.networks import Networks, in_order, in_parts
from components.rl.reference import Reference
from components.rl.stream import Stream
from components.rl.types import Algorithm, Batch, Rollout, micro_rows
from components.scoring import Scorer
from components.tokens import Tokenizer, encode_prompt, pad


@dataclass(frozen=True)
class Models:
    """Everything that is only read during a rollout."""

    networks: Networks
    reference: Reference
    sampler: PolicySampler
    reward: Scorer
    cost: Scorer | None
    tokenizer: Tokenizer
    dtype: str
    """The arithmetic of training: policy and sampler must not differ by it."""


def collect(models: Models, prompts: Sequence[Conversation], group_size: int, max_prompt: int, micro: int) -> Rollout:
    """A rollout of `group_size` responses to each prompt, with log-probabilities recomputed by the trainer.

    The sampler's own log-probabilities come from other kernels (a key-value cache, perhaps another engine);
    the update's ratios must start at 1, so the old policy is what the trainer says it was.
    """
    encoded = [encode_prompt(models.tokenizer, prompt)[-max_prompt:] for prompt in prompts]
    with autocast(models.dtype):
        samples = models.sampler.sample(encoded, group_size)
    rows = [index for index in range(len(prompts)) for _ in range(group_size)]
    ids, mask = pad([encoded[index] for index in rows], models.tokenizer.eos_token_id, side="left")
    input_ids = torch.cat([ids.to(samples.ids.device), samples.ids], dim=1)
    attention_mask = torch.cat([mask.to(samples.ids.device), samples.mask], dim=1)
    length = samples.ids.shape[1]
    parts = micro_rows(attention_mask, micro, group_size if group_size <= micro else 1)
    old = in_parts(lambda i, m: models.networks(i, m, length), parts, input_ids, attention_mask)
    temperature = models.networks.temperature
    texts = decode(models.tokenizer, samples)
    asked = [prompts[index] for index in rows]
    return Rollout(
        input_ids,
        attention_mask,
        samples.mask,
        logprobs=in_order(parts, [forward.logprobs for forward in old]),
        ref_logprobs=models.reference.logprobs(input_ids, attention_mask, length, temperature, parts),
        scores=models.reward.score(asked, texts).to(input_ids.device),
        ended=samples.ended,
        costs=None if models.cost is None else models.cost.score(asked, texts).to(input_ids.device),
        values=_joined(parts, [forward.values for forward in old]),
        cost_values=_joined(parts, [forward.cost_values for forward in old]),
        group_size=group_size,
        sampled_logprobs=samples.logprobs,
    )


def _joined(parts: Sequence[Tensor], values: Sequence[Tensor | None]) -> Tensor | None:
    """The values of all parts as one tensor; None where there is no such critic."""
    present = [value for value in values if value is not None]
    return in_order(parts, present) if present else None


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
        "rollout/score_max": float(rollout.scores.max()),
        "rollout/length": float(rollout.mask.sum(1).float().mean()),
        "rollout/missing_eos": float((~rollout.ended).float().mean()),
        "rollout/logprob": float(masked_mean(rollout.logprobs, rollout.mask)),
    }
    if rollout.costs is not None:
        metrics["rollout/cost"] = float(rollout.costs.mean())
        metrics["rollout/unsafe"] = float((rollout.costs > 0).float().mean())
    return metrics


class RolloutSource:
    """What the algorithm makes of rollouts, each from the policy as it is when asked for."""

    def __init__(
        self,
        models: Models,
        algorithm: Algorithm,
        stream: Stream[Conversation],
        size: int,
        max_prompt: int,
        micro: int,
        max_weight: float,
    ) -> None:
        self.models, self.algorithm, self.stream = models, algorithm, stream
        self.size, self.max_prompt, self.micro, self.max_weight = size, max_prompt, micro, max_weight
        self.rows_per_batch = size * algorithm.rows_per_prompt

    def batch(self, number: int) -> Batch:
        """What rollout `number` (0-based) teaches, and what it says of the policy."""
        self.models.networks.eval()
        prompts = self.stream.batch(number, self.size)
        rollout = collect(self.models, prompts, self.algorithm.group_size, self.max_prompt, self.micro)
        rollout, mismatch = self._corrected(rollout)
        batch = self.algorithm.targets(rollout)
        batch.metrics.update(mismatch | self.models.sampler.metrics)
        counts = {"rollout/samples": float(len(rollout.mask)), "rollout/tokens": float(rollout.mask.sum())}
        batch.metrics.update(rollout_metrics(rollout) | counts | self.models.reward.metrics)
        batch.metrics.update({} if self.models.cost is None else self.models.cost.metrics)
        if rollout.costs is not None:
            batch.scatter.extend(zip(rollout.scores.tolist(), rollout.costs.tolist(), strict=True))
        return batch

    def _corrected(self, rollout: Rollout) -> tuple[Rollout, Metrics]:
        """The rollout, weighted where another policy sampled it, and how far sampler and trainer are apart."""
        assert rollout.sampled_logprobs is not None
        given = rollout.logprobs, rollout.sampled_logprobs, rollout.mask
        metrics = gap_metrics(*given)
        if self.models.sampler.on_policy or self.algorithm.ratio is None:
            return rollout, metrics
        weights = importance_weights(*given, self.algorithm.ratio, self.max_weight)
        return replace(rollout, weights=weights), metrics | weight_metrics(weights, rollout.mask, self.max_weight)

    def state(self) -> dict[str, Tensor]:
        """The random state of the sampler."""
        return {"random.sampler": self.models.sampler.state()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.models.sampler.restore(tensors["random.sampler"])
