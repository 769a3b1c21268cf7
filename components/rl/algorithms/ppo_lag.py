"""PPO-Lag: PPO on reward minus lambda times cost, with lambda raised while the mean cost is above its limit."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from components.artifacts import Metrics
from components.rl.algorithm_settings import PPOLagSettings
from components.rl.algorithms.ppo import PPO, critic_metrics
from components.rl.controllers import CostWindow, build_multiplier
from components.rl.functional import Total, clipped_value_loss, gae, loss_weights, token_rewards
from components.rl.types import Batch, Forward, Means, Rollout


class PPOLag(PPO):
    """Two streams, two critics, one multiplier (safe-rlhf, Dai et al. 2023, equations 9 to 11).

    The KL penalty enters the cost stream with the opposite sign, so that its weight in the combined advantage
    (A_r - lambda A_c) / (1 + lambda) is kl_coef whatever lambda is. Lambda moves before the policy does, by J_C, the
    mean of the latest costs over all processes.
    """

    settings: PPOLagSettings

    def __init__(self, settings: PPOLagSettings, total: Total, max_new_tokens: int) -> None:
        super().__init__(settings, total, max_new_tokens)
        self.multiplier = build_multiplier(settings)
        self.window = CostWindow(settings.cost_window, total)
        self.rollouts = 0

    def targets(self, rollout: Rollout) -> Batch:
        """Moves lambda first, then the combined advantages and the returns of both streams."""
        assert rollout.costs is not None and rollout.cost_values is not None
        settings = self.settings
        constrained = (rollout.costs > 0).float() if settings.constrain == "unsafe" else rollout.costs
        metrics = self.update_multiplier(constrained)
        penalty = self.penalty(rollout)
        batch = self.reward_stream(rollout, penalty)
        assert batch.advantages is not None
        costs = token_rewards(constrained.clamp(-settings.score_clip, settings.score_clip), -penalty, rollout.mask)
        cost_advantages, cost_returns = gae(costs, rollout.cost_values, rollout.mask, settings.gamma, settings.lam)
        weight = self.multiplier.value
        combined = (batch.advantages - weight * cost_advantages) / (1 + weight)
        critic = critic_metrics("cost_value", rollout.cost_values, cost_returns, rollout.mask)
        return replace(
            batch,
            advantages=self.scaled(combined, rollout.mask),
            cost_returns=cost_returns,
            cost_values=rollout.cost_values,
            metrics=batch.metrics | metrics | critic,
        )

    def update_multiplier(self, costs: Tensor) -> Metrics:
        """Take the costs (B,), or what stands for them, into the window and move lambda by its mean; returns both."""
        mean, low, high = self.window.add(costs)
        self.rollouts += 1
        if self.rollouts > self.settings.lambda_delay:
            self.multiplier.update(mean)
        return {
            "cost/lambda": self.multiplier.value,
            "cost/window_mean": mean,
            "cost/window_low": low,
            "cost/window_high": high,
            "cost/limit": self.settings.cost_limit,
        }

    def loss(self, batch: Batch, forward: Forward) -> tuple[Tensor, Means]:
        """PPO's loss on the combined advantages, and the cost critic's."""
        assert forward.cost_values is not None and batch.cost_values is not None and batch.cost_returns is not None
        settings = self.settings
        total, means = super().loss(batch, forward)
        weights = loss_weights(batch.mask, settings.normalization)
        cost_value = clipped_value_loss(
            forward.cost_values, batch.cost_values, batch.cost_returns, batch.mask, settings.value_clip, weights
        )
        means["loss/cost_value"] = (cost_value.item(), self.terms(batch))
        return total + settings.value_coef * cost_value, means

    def state_dict(self) -> dict[str, Any]:
        """Lambda, the window of costs, and the count of rollouts, beside PPO's own."""
        return super().state_dict() | {
            "multiplier": self.multiplier.state_dict(),
            "costs": list(self.window.costs),
            "rollouts": self.rollouts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        super().load_state_dict(state)
        self.multiplier.load_state_dict(state["multiplier"])
        self.window.costs.clear()
        self.window.costs.extend(state["costs"])
        self.rollouts = state["rollouts"]
