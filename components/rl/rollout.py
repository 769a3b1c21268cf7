"""Rollouts: drafts that the networks under training have read, and what the algorithm makes of them."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from components.artifacts import Metrics
from components.divergence import kl_estimate
from components.models import device
from components.phases import Phases
from components.ranks import ALONE, Ranks
from components.rl.drafts import Draft, Drafts
from components.rl.functional import masked_mean, masked_sum
from components.rl.importance import gap_metrics, importance_weights, weight_metrics
from components.rl.networks import Networks, in_order
from components.rl.types import Algorithm, Batch, Forward, Rollout, State, micro_rows

AGREEMENT, LIKENESS = 1e-4, 0.1
"""Nats per token within which the sampler's log-probabilities do for the trainer's. Where ratios are taken to them, no
more than other kernels make of the same sums in float32, which is next to nothing over hundreds of tokens; where they
only say how far the policy is from the reference, what bfloat16 makes of them too."""


def read(
    networks: Networks,
    draft: Draft,
    micro: int,
    trusted: Tensor | None = None,
    tolerance: float = AGREEMENT,
    phases: Phases | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Rollout, Metrics]:
    """The rollout that a draft becomes, and how far sampler and trainer are apart.

    The sampler's log-probabilities come from other kernels (a key-value cache, perhaps another engine), and an update's
    ratios must start at 1: so the old policy is what the trainer says it was. Where nothing else is wanted of the rows,
    `trusted` names some to look at, and if the two agree on those within `tolerance`, the others are not read.
    """
    networks.eval()
    phases = phases or Phases()
    if trusted is not None:
        logprobs = _forward(networks, draft, trusted, micro, phases, ranks)["logprobs"]
        assert logprobs is not None
        gaps = gap_metrics(logprobs, draft.sampled_logprobs[trusted], draft.mask[trusted])
        if gaps["sampler/logprob_gap_max"] <= tolerance:
            return _rollout(draft, logprobs=draft.sampled_logprobs), gaps | {"sampler/reused": 1.0}
    rollout = _rollout(draft, **_forward(networks, draft, torch.arange(len(draft.mask)), micro, phases, ranks))
    return rollout, gap_metrics(rollout.logprobs, draft.sampled_logprobs, draft.mask) | {"sampler/reused": 0.0}


@torch.no_grad()
def _forward(
    networks: Networks, draft: Draft, rows: Tensor, micro: int, phases: Phases, ranks: Ranks
) -> dict[str, Tensor | None]:
    """What the networks say of some rows, whole groups in turn: tensors (rows, R) by name."""
    length = draft.mask.shape[1]
    ids, mask = draft.input_ids[rows], draft.attention_mask[rows]
    parts = micro_rows(mask, micro, draft.group_size if draft.group_size <= micro else 1)
    with phases.phase("read", int(mask.sum())):
        found: list[Forward] = ranks.spread(parts, lambda part: networks(ids[part], mask[part], length))
    return {
        name: _joined(parts, [getattr(forward, name) for forward in found])
        for name in ("logprobs", "values", "cost_values")
    }


def _joined(parts: Sequence[Tensor], values: Sequence[Tensor | None]) -> Tensor | None:
    """The values of all parts as one tensor; None where there is no such critic."""
    present = [value for value in values if value is not None]
    return in_order(parts, present).to(device()) if present else None


def _rollout(draft: Draft, **read: Tensor | None) -> Rollout:
    return Rollout(
        draft.input_ids,
        draft.attention_mask,
        draft.mask,
        ref_logprobs=draft.ref_logprobs,
        scores=draft.scores,
        ended=draft.ended,
        costs=draft.costs,
        group_size=draft.group_size,
        **read,  # type: ignore[arg-type]
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
    """What the algorithm makes of rollouts."""

    def __init__(
        self,
        drafts: Drafts,
        networks: Networks,
        algorithm: Algorithm,
        size: int,
        micro: int,
        max_weight: float,
        sole_update: bool = False,
        phases: Phases | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """`size` prompts a rollout; `micro` rows of full length are read at once, or as many as take no more room.

        With a `sole_update` on each rollout, the old policy's log-probabilities are those of its own forward pass.
        Each of the `ranks` reads some of the rows, and has what all of them read.
        """
        self.drafts, self.networks, self.algorithm = drafts, networks, algorithm
        self.micro, self.max_weight, self.phases, self.ranks = micro, max_weight, phases or Phases(), ranks
        self.rows_per_batch = size * algorithm.rows_per_prompt
        self.weighs = algorithm.ratio is not None and not drafts.on_policy
        self.compares = algorithm.ratio is not None and not sole_update

    def batch(self, number: int) -> Batch:
        """What rollout `number` (0-based) teaches, and what it says of the policy."""
        draft = self.drafts.draft(number)
        tolerance, trusted = AGREEMENT if self.compares else LIKENESS, self._trusted(draft, number)
        rollout, mismatch = read(self.networks, draft, self.micro, trusted, tolerance, self.phases, self.ranks)
        if self.weighs:
            rollout, mismatch = self._weighted(rollout, draft, mismatch)
        batch = self.algorithm.targets(rollout)
        counts = {"rollout/samples": float(len(rollout.mask)), "rollout/tokens": float(rollout.mask.sum())}
        batch.metrics.update(mismatch | rollout_metrics(rollout) | counts | draft.metrics)
        if rollout.costs is not None:
            batch.scatter.extend(zip(rollout.scores.tolist(), rollout.costs.tolist(), strict=True))
        if self.compares:
            return batch
        if self.drafts.on_policy:
            batch.metrics["policy/first_ratio_gap"] = math.expm1(mismatch["sampler/logprob_gap_max"])
        return replace(batch, logprobs=None)

    def _trusted(self, draft: Draft, number: int) -> Tensor | None:
        """The rows that speak for all: a group, another in every rollout; none where each has to be read anyway."""
        if self.weighs or self.networks.has_critics:
            return None
        groups = len(draft.mask) // draft.group_size
        return torch.arange(draft.group_size) + number % groups * draft.group_size

    def _weighted(self, rollout: Rollout, draft: Draft, metrics: Metrics) -> tuple[Rollout, Metrics]:
        """The rollout with the importance weights of what another policy sampled."""
        assert self.algorithm.ratio is not None
        given = rollout.logprobs, draft.sampled_logprobs, rollout.mask
        weights = importance_weights(*given, self.algorithm.ratio, self.max_weight)
        return replace(rollout, weights=weights), metrics | weight_metrics(weights, rollout.mask, self.max_weight)

    def state(self) -> State:
        """What later drafts depend on."""
        return self.drafts.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.drafts.restore(tensors)

    def close(self) -> None:
        """End what makes drafts elsewhere."""
        self.drafts.close()
