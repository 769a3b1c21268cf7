"""Best-of-K: supervised learning from the best of K responses just sampled to the same prompt."""

from typing import Any, Literal

import torch
from torch import Tensor

from components.rl.algorithm_settings import BestOfKSettings
from components.rl.functional import eos_rule, flat_groups, loss_terms, loss_weights, masked_sum
from components.rl.types import Batch, Forward, Means, Rollout


class BestOfK:
    """Nothing holds the policy to the reference but the slow drift of its own samples; the KL is logged.

    KL(best of K || policy) is at most log K - (K - 1) / K (Beirami et al. 2024), which bounds one round's pull.
    Of equally good responses the first is kept.
    """

    rows_per_prompt = 1
    ratio: Literal["token", "sequence"] | None = None

    def __init__(self, settings: BestOfKSettings, max_new_tokens: int) -> None:
        self.settings, self.group_size = settings, settings.group_size
        self.constant = settings.normalization_constant or max_new_tokens

    def targets(self, rollout: Rollout) -> Batch:
        """The best row of every group."""
        settings = self.settings
        scores = eos_rule(rollout.scores, rollout.ended, settings.missing_eos, settings.missing_eos_penalty)
        clamped = scores.clamp(-settings.score_clip, settings.score_clip)
        groups = clamped.view(-1, rollout.group_size)
        best = torch.arange(len(groups), device=scores.device) * rollout.group_size + groups.argmax(1)
        batch = Batch.of(rollout).rows(best)
        batch.metrics["rollout/best_score"] = float(rollout.scores[best].mean())
        batch.metrics["policy/flat_groups"] = float(flat_groups(clamped, rollout.group_size).float().mean())
        return batch

    def terms(self, batch: Batch) -> float:
        """Tokens, responses, or responses times the constant."""
        return loss_terms(batch.mask, self.settings.normalization, self.constant)

    def loss(self, batch: Batch, forward: Forward) -> tuple[Tensor, Means]:
        """The negative log-likelihood of the best responses, summed."""
        weights = loss_weights(batch.mask, self.settings.normalization)
        total = -masked_sum(forward.logprobs * weights, batch.mask)
        entropy = masked_sum(forward.entropy.detach(), batch.mask).item()
        tokens = float(batch.mask.sum())
        means = {"loss/policy": (total.item(), self.terms(batch)), "policy/entropy": (entropy, tokens)}
        return total, means

    def state_dict(self) -> dict[str, Any]:
        """Best-of-K has no state of its own."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""
