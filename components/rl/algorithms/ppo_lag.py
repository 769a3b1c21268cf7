"""PPO-Lag: PPO on reward minus lambda times cost, with lambda raised while the mean cost is above its limit."""

import math
from collections import deque
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from components.artifacts import Metrics
from components.divergence import kl_estimate
from components.rl.algorithms.ppo import PPO, critic_metrics
from components.rl.functional import Total, clipped_value_loss, gae, token_rewards
from components.rl.settings import PPOLagSettings
from components.rl.types import Batch, Forward, Rollout


class PPOLag(PPO):
    """Two streams, two critics, one multiplier (safe-rlhf, Dai et al. 2023, equations 9 to 11).

    The KL penalty enters the cost stream with the opposite sign, so that its weight in the combined advantage
    (A_r - lambda A_c) / (1 + lambda) is kl_coef whatever lambda is. log lambda climbs by
    lambda_lr * lambda * (J_C - cost_limit), J_C the mean of the latest costs over all processes.
    """

    settings: PPOLagSettings

    def __init__(self, settings: PPOLagSettings, total: Total) -> None:
        super().__init__(settings, total)
        self.log_lambda = math.log(settings.lambda_init)
        self.costs: deque[float] = deque(maxlen=settings.cost_window)
        self.rollouts = 0

    @property
    def multiplier(self) -> float:
        """Lambda, a plain number: no gradient reaches it from the policy."""
        return math.exp(self.log_lambda)

    def targets(self, rollout: Rollout) -> Batch:
        """Moves lambda first, then the combined advantages and the returns of both streams."""
        assert rollout.costs is not None and rollout.cost_values is not None
        settings = self.settings
        mean_cost = self.update_multiplier(rollout.costs)
        batch = self.reward_stream(rollout)
        penalty = settings.kl_coef * kl_estimate(rollout.logprobs, rollout.ref_logprobs, settings.kl_estimator)
        costs = token_rewards(rollout.costs.clamp(-settings.score_clip, settings.score_clip), -penalty, rollout.mask)
        cost_advantages, cost_returns = gae(costs, rollout.cost_values, rollout.mask, settings.gamma, settings.lam)
        combined = (batch.advantages - self.multiplier * cost_advantages) / (1 + self.multiplier)
        metrics: Metrics = {"cost/lambda": self.multiplier, "cost/window_mean": mean_cost}
        return replace(
            batch,
            advantages=self.scaled(combined, rollout.mask),
            cost_returns=cost_returns,
            cost_values=rollout.cost_values,
            metrics=batch.metrics
            | metrics
            | critic_metrics("cost_value", rollout.cost_values, cost_returns, rollout.mask),
        )

    def update_multiplier(self, costs: Tensor) -> float:
        """One ascent step on log lambda from the window's mean cost, which is returned."""
        self.costs.extend(costs.tolist())
        sums = self.total(torch.tensor([sum(self.costs), float(len(self.costs))], device=costs.device))
        mean_cost = float(sums[0] / sums[1])
        self.rollouts += 1
        if self.rollouts > self.settings.lambda_delay:
            self.log_lambda += self.settings.lambda_lr * self.multiplier * (mean_cost - self.settings.cost_limit)
            self.log_lambda = min(self.log_lambda, math.log(self.settings.lambda_max))
        return mean_cost

    def loss(self, batch: Batch, forward: Forward) -> tuple[Tensor, Metrics]:
        """PPO's loss on the combined advantages, and the cost critic's."""
        assert forward.cost_values is not None and batch.cost_values is not None and batch.cost_returns is not None
        total, sums = super().loss(batch, forward)
        cost_value = clipped_value_loss(
            forward.cost_values, batch.cost_values, batch.cost_returns, batch.mask, self.settings.value_clip
        )
        return total + self.settings.value_coef * cost_value, sums | {"loss/cost_value": cost_value.item()}

    def state_dict(self) -> dict[str, Any]:
        """Lambda, the window of costs, and the count of rollouts."""
        return {"log_lambda": self.log_lambda, "costs": list(self.costs), "rollouts": self.rollouts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.log_lambda, self.rollouts = state["log_lambda"], state["rollouts"]
        self.costs = deque(state["costs"], maxlen=self.settings.cost_window)
