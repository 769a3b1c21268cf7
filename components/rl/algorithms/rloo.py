"""RLOO: REINFORCE on whole responses, each compared with the mean of the others to the same prompt."""

from typing import Any, Literal

import torch
from torch import Tensor

from components.divergence import kl_estimate
from components.rl.algorithm_settings import RLOOSettings
from components.rl.controllers import KLController
from components.rl.functional import (
    Total,
    clipped_policy_loss,
    eos_rule,
    leave_one_out,
    masked_sum,
    sequence_sums,
    whiten,
)
from components.rl.types import Batch, Forward, Means, Rollout


class RLOO:
    """The reward of a response is its score minus kl_coef times its summed KL (Ahmadian et al. 2024, section 3).

    The ratio is that of whole responses, clipped as in PPO; there is no critic.
    """

    ratio: Literal["token", "sequence"] | None = "sequence"

    def __init__(self, settings: RLOOSettings, total: Total) -> None:
        self.settings, self.total = settings, total
        self.group_size = self.rows_per_prompt = settings.group_size
        self.kl = KLController(settings, total)

    def targets(self, rollout: Rollout) -> Batch:
        """Advantages (B,) of whole responses."""
        settings = self.settings
        kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, settings.kl_estimator)
        self.kl.update(kl, rollout.mask)
        scores = eos_rule(rollout.scores, rollout.ended, settings.missing_eos, settings.missing_eos_penalty)
        clamped = scores.clamp(-settings.score_clip, settings.score_clip)
        rewards = clamped - self.kl.coef * sequence_sums(kl, rollout.mask)
        advantages = leave_one_out(rewards, rollout.group_size)
        metrics = {"policy/kl_coef": self.kl.coef, "policy/advantage_std": float(advantages.std(unbiased=False))}
        if settings.whiten_advantages:
            advantages = whiten(advantages, torch.ones_like(advantages, dtype=torch.bool), self.total)
        return Batch.of(rollout, advantages=advantages, metrics=metrics, group=self.group_size)

    def terms(self, batch: Batch) -> float:
        """Responses."""
        return float(len(batch))

    def loss(self, batch: Batch, forward: Forward) -> tuple[Tensor, Means]:
        """The clipped objective of whole responses, summed over them."""
        assert batch.advantages is not None
        rows = self.terms(batch)
        policy = clipped_policy_loss(
            sequence_sums(forward.logprobs, batch.mask),
            sequence_sums(batch.old_logprobs(forward), batch.mask),
            batch.advantages,
            torch.ones_like(batch.advantages, dtype=torch.bool),
            self.settings.clip,
            weights=batch.weights,
        )
        entropy = masked_sum(forward.entropy, batch.mask)
        tokens = float(batch.mask.sum())
        means = {
            "loss/policy": (policy.total.item(), rows),
            "policy/clip_fraction": (float(policy.clipped), rows),
            "policy/approx_kl": (policy.approx_kl.item(), rows),
            "policy/ratio": (policy.ratio.item(), rows),
            "policy/entropy": (entropy.item(), tokens),
        }
        return policy.total - self.settings.entropy_coef * entropy, means

    def state_dict(self) -> dict[str, Any]:
        """The KL coefficient."""
        return self.kl.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.kl.load_state_dict(state)
