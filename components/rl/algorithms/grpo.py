"""GRPO: PPO's token objective with advantages relative to the group in place of a critic, KL in the loss."""

from typing import Any, Literal

from torch import Tensor

from components.divergence import kl_estimate
from components.rl.algorithm_settings import GRPOSettings
from components.rl.controllers import KLController
from components.rl.functional import (
    Total,
    clipped_policy_loss,
    eos_rule,
    flat_groups,
    group_advantages,
    loss_terms,
    loss_weights,
    masked_sum,
)
from components.rl.types import Batch, Forward, Means, Rollout


class GRPO:
    """Every token of a response has the response's advantage (Shao et al. 2024, equation 3).

    The KL to the reference is a term of the loss with a gradient, not a part of the reward.
    """

    ratio: Literal["token", "sequence"] | None = "token"

    def __init__(self, settings: GRPOSettings, total: Total, max_new_tokens: int) -> None:
        self.settings, self.total = settings, total
        self.group_size = self.rows_per_prompt = settings.group_size
        self.constant = settings.normalization_constant or max_new_tokens
        self.kl = KLController(settings, total)

    def targets(self, rollout: Rollout) -> Batch:
        """Advantages (B, R) and the reference's log-probabilities."""
        settings = self.settings
        self.kl.update(kl_estimate(rollout.logprobs, rollout.ref_logprobs, settings.kl_estimator), rollout.mask)
        scores = eos_rule(rollout.scores, rollout.ended, settings.missing_eos, settings.missing_eos_penalty)
        clamped = scores.clamp(-settings.score_clip, settings.score_clip)
        advantages = group_advantages(
            clamped, rollout.group_size, settings.scale, settings.scale_eps, self.total
        )
        metrics = {
            "policy/kl_coef": self.kl.coef,
            "policy/flat_groups": float(flat_groups(clamped, rollout.group_size).float().mean()),
        }
        spread = advantages[:, None] * rollout.mask
        targets = {"advantages": spread, "ref_logprobs": rollout.ref_logprobs}
        return Batch.of(rollout, **targets, metrics=metrics, group=self.group_size)

    def terms(self, batch: Batch) -> float:
        """Tokens, responses, or responses times the constant."""
        return loss_terms(batch.mask, self.settings.normalization, self.constant)

    def loss(self, batch: Batch, forward: Forward) -> tuple[Tensor, Means]:
        """The clipped objective and the KL to the reference, summed."""
        assert batch.advantages is not None and batch.ref_logprobs is not None
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
        kl = masked_sum(
            kl_estimate(forward.logprobs, batch.ref_logprobs, settings.kl_estimator) * weights, batch.mask
        )
        entropy = masked_sum(forward.entropy * weights, batch.mask)
        terms, tokens = self.terms(batch), float(batch.mask.sum())
        means = {
            "loss/policy": (policy.total.item(), terms),
            "loss/kl": (kl.item(), terms),
            "policy/clip_fraction": (float(policy.clipped), tokens),
            "policy/approx_kl": (policy.approx_kl.item(), tokens),
            "policy/ratio": (policy.ratio.item(), tokens),
            "policy/entropy": (masked_sum(forward.entropy.detach(), batch.mask).item(), tokens),
        }
        return policy.total + self.kl.coef * kl - settings.entropy_coef * entropy, means

    def state_dict(self) -> dict[str, Any]:
        """The KL coefficient."""
        return self.kl.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.kl.load_state_dict(state)
