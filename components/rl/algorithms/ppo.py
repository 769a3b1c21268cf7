"""PPO: a clipped policy-gradient step on advantages from a learned critic, KL to the reference in the reward."""

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from components.artifacts import Metrics
from components.divergence import kl_estimate
from components.rl.algorithm_settings import PPOSettings
from components.rl.controllers import KLController
from components.rl.functional import (
    Total,
    clipped_policy_loss,
    clipped_value_loss,
    eos_rule,
    gae,
    loss_terms,
    loss_weights,
    masked_sum,
    token_rewards,
    whiten,
)
from components.rl.types import Batch, Forward, Means, Rollout


class PPO:
    """Rewards are -kl_coef * KL per token plus the score at the last token; advantages by GAE."""

    group_size = rows_per_prompt = 1
    ratio: Literal["token", "sequence"] | None = "token"

    def __init__(self, settings: PPOSettings, total: Total, max_new_tokens: int) -> None:
        self.settings, self.total = settings, total
        self.constant = settings.normalization_constant or max_new_tokens
        self.kl = KLController(settings, total)

    def targets(self, rollout: Rollout) -> Batch:
        """Advantages and returns of the reward stream."""
        batch = self.reward_stream(rollout, self.penalty(rollout))
        assert batch.advantages is not None
        return replace(batch, advantages=self.scaled(batch.advantages, batch.mask))

    def penalty(self, rollout: Rollout) -> Tensor:
        """The KL penalty (B, R) of each token; the coefficient moves first, where it has a target."""
        kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, self.settings.kl_estimator)
        self.kl.update(kl, rollout.mask)
        return self.kl.coef * kl

    def reward_stream(self, rollout: Rollout, penalty: Tensor) -> Batch:
        """Returns, and advantages as GAE gives them."""
        assert rollout.values is not None
        settings = self.settings
        scores = eos_rule(rollout.scores, rollout.ended, settings.missing_eos, settings.missing_eos_penalty)
        rewards = token_rewards(scores.clamp(-settings.score_clip, settings.score_clip), penalty, rollout.mask)
        if settings.whiten_rewards:
            rewards = whiten(rewards, rollout.mask, self.total, shift_mean=False)
        advantages, returns = gae(rewards, rollout.values, rollout.mask, settings.gamma, settings.lam)
        metrics = critic_metrics("value", rollout.values, returns, rollout.mask) | {"policy/kl_coef": self.kl.coef}
        return Batch.of(rollout, advantages=advantages, returns=returns, values=rollout.values, metrics=metrics)

    def terms(self, batch: Batch) -> float:
        """Tokens, responses, or responses times the constant: the same for a row in whatever micro-batch it falls."""
        return loss_terms(batch.mask, self.settings.normalization, self.constant)

    def loss(self, batch: Batch, forward: Forward) -> tuple[Tensor, Means]:
        """The policy's and the critic's loss, summed."""
        assert forward.values is not None and batch.values is not None and batch.returns is not None
        assert batch.advantages is not None
        settings = self.settings
        weights = loss_weights(batch.mask, settings.normalization)
        policy = clipped_policy_loss(
            forward.logprobs,
            batch.old_logprobs(forward),
            batch.advantages,
            batch.mask,
            settings.clip,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
            weights=loss_weights(batch.mask, settings.normalization, batch.weights),
        )
        entropy = masked_sum(forward.entropy * weights, batch.mask)
        value = clipped_value_loss(
            forward.values, batch.values, batch.returns, batch.mask, settings.value_clip, weights
        )
        terms, tokens = self.terms(batch), float(batch.mask.sum())
        means = {
            "loss/policy": (policy.total.item(), terms),
            "loss/value": (value.item(), terms),
            "policy/clip_fraction": (float(policy.clipped), tokens),
            "policy/approx_kl": (policy.approx_kl.item(), tokens),
            "policy/ratio": (policy.ratio.item(), tokens),
            "policy/entropy": (masked_sum(forward.entropy.detach(), batch.mask).item(), tokens),
        }
        return policy.total - settings.entropy_coef * entropy + settings.value_coef * value, means

    def scaled(self, advantages: Tensor, mask: Tensor) -> Tensor:
        """Advantages whitened over the global batch, if the settings say so."""
        return whiten(advantages, mask, self.total) if self.settings.whiten_advantages else advantages

    def state_dict(self) -> dict[str, Any]:
        """The KL coefficient."""
        return self.kl.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.kl.load_state_dict(state)


def critic_metrics(name: str, values: Tensor, returns: Tensor, mask: Tensor) -> Metrics:
    """How much of the variance of the returns the critic explained before this update."""
    error, spread = (returns - values)[mask].var(unbiased=False), returns[mask].var(unbiased=False)
    return {
        f"value/{name}_explained": float(1 - error / (spread + 1e-8)),
        f"value/{name}_mean": float(values[mask].mean()),
    }
