"""PPO: a clipped policy-gradient step on advantages from a learned critic, KL to the reference in the reward."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from components.artifacts import Metrics
from components.divergence import kl_estimate
from components.rl.functional import (
    Total,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    masked_sum,
    token_rewards,
    whiten,
)
from components.rl.settings import PPOSettings
from components.rl.types import Batch, Forward, Rollout


class PPO:
    """Rewards are -kl_coef * KL per token plus the score at the last token; advantages by GAE."""

    group_size = 1

    def __init__(self, settings: PPOSettings, total: Total) -> None:
        self.settings, self.total = settings, total

    def targets(self, rollout: Rollout) -> Batch:
        """Advantages and returns of the reward stream."""
        batch = self.reward_stream(rollout)
        return replace(batch, advantages=self.scaled(batch.advantages, batch.mask))

    def reward_stream(self, rollout: Rollout) -> Batch:
        """Returns, and advantages as GAE gives them."""
        assert rollout.values is not None
        settings = self.settings
        penalty = settings.kl_coef * kl_estimate(rollout.logprobs, rollout.ref_logprobs, settings.kl_estimator)
        rewards = token_rewards(shaped_scores(rollout, settings), penalty, rollout.mask)
        advantages, returns = gae(rewards, rollout.values, rollout.mask, settings.gamma, settings.lam)
        return Batch(
            rollout.input_ids,
            rollout.attention_mask,
            rollout.mask,
            rollout.logprobs,
            advantages=advantages,
            returns=returns,
            values=rollout.values,
            metrics=critic_metrics("value", rollout.values, returns, rollout.mask),
        )

    def terms(self, batch: Batch) -> float:
        """Response tokens: a token weighs the same in whatever micro-batch it falls."""
        return float(batch.mask.sum())

    def loss(self, batch: Batch, forward: Forward) -> tuple[Tensor, Metrics]:
        """The policy's and the critic's loss, summed over response tokens."""
        assert forward.values is not None and batch.values is not None and batch.returns is not None
        settings = self.settings
        policy = clipped_policy_loss(forward.logprobs, batch.logprobs, batch.advantages, batch.mask, settings.clip)
        value = clipped_value_loss(forward.values, batch.values, batch.returns, batch.mask, settings.value_clip)
        sums = {
            "loss/policy": policy.total.item(),
            "loss/value": value.item(),
            "policy/clip_fraction": float(policy.clipped),
            "policy/approx_kl": policy.approx_kl.item(),
            "policy/ratio": policy.ratio.item(),
            "policy/entropy": masked_sum(forward.entropy.detach(), batch.mask).item(),
        }
        return policy.total + settings.value_coef * value, sums

    def scaled(self, advantages: Tensor, mask: Tensor) -> Tensor:
        """Advantages whitened over the global batch, if the settings say so."""
        return whiten(advantages, mask, self.total) if self.settings.whiten_advantages else advantages

    def state_dict(self) -> dict[str, Any]:
        """PPO has no state of its own."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""


def shaped_scores(rollout: Rollout, settings: PPOSettings) -> Tensor:
    """Scores (B,) after the missing-EOS rule, clamped; the KL is added later and never clamped."""
    scores, penalty = rollout.scores, settings.missing_eos_penalty
    if settings.missing_eos == "penalty":
        scores = torch.where(rollout.ended, scores, scores - penalty)
    elif settings.missing_eos == "replace":
        scores = torch.where(rollout.ended, scores, torch.full_like(scores, -penalty))
    return scores.clamp(-settings.score_clip, settings.score_clip)


def critic_metrics(name: str, values: Tensor, returns: Tensor, mask: Tensor) -> Metrics:
    """How much of the variance of the returns the critic explained before this update."""
    error, spread = (returns - values)[mask].var(unbiased=False), returns[mask].var(unbiased=False)
    return {
        f"value/{name}_explained": float(1 - error / (spread + 1e-8)),
        f"value/{name}_mean": float(values[mask].mean()),
    }
