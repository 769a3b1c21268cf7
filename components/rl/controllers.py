"""What moves by itself during training: the KL coefficient towards its target, the multiplier towards the cost limit.

Their state is plain numbers: no gradient reaches them, and a checkpoint holds them as JSON.
"""

import math
from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor

from components.rl.algorithm_settings import PolicyGradientSettings, PPOLagSettings
from components.rl.functional import Total

MAX_KL_ERROR = 0.2
"""The relative error of the KL is clipped to this before it moves the coefficient (Ziegler et al. 2019)."""


class KLController:
    """The weight of the KL penalty: constant, or steered to a KL per response.

    coef <- coef * (1 + clip(KL / target - 1, -0.2, 0.2) * responses / horizon) (Ziegler et al. 2019, section 2.2); a
    rollout of more responses than the horizon counts as one of as many, so that the coefficient stays above 0.
    """

    def __init__(self, settings: PolicyGradientSettings, total: Total) -> None:
        self.coef, self.target, self.horizon = settings.kl_coef, settings.kl_target, settings.kl_horizon
        self.total = total

    def update(self, kl: Tensor, mask: Tensor) -> None:
        """Move by the KL per token (B, R) of a rollout, where there is a target."""
        if self.target is None:
            return
        summed = kl.masked_fill(~mask, 0.0).sum()
        nats, responses = self.total(torch.stack([summed, torch.full_like(summed, len(mask))])).tolist()
        error = nats / responses / self.target - 1
        self.coef *= 1 + max(-MAX_KL_ERROR, min(MAX_KL_ERROR, error)) * min(1.0, responses / self.horizon)

    def state_dict(self) -> dict[str, float]:
        """The coefficient."""
        return {"kl_coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.coef = state["kl_coef"]


class CostWindow:
    """The mean of the latest costs over all processes, weighted by how many each holds, with a 95 % band."""

    def __init__(self, size: int, total: Total) -> None:
        self.costs: deque[float] = deque(maxlen=size)
        self.total = total

    def add(self, costs: Tensor) -> tuple[float, float, float]:
        """Take in costs (B,); returns mean, and the lower and upper end of its normal 95 % interval."""
        self.costs.extend(costs.tolist())
        own = torch.tensor([[1.0, cost, cost * cost] for cost in self.costs], dtype=torch.float64).sum(0)
        count, summed, squares = self.total(own.to(costs.device)).tolist()
        mean = summed / count
        variance = max(0.0, squares / count - mean * mean) * count / max(1.0, count - 1)
        half = 1.96 * math.sqrt(variance / count)
        return mean, mean - half, mean + half


class Multiplier(Protocol):
    """Lambda: at least 0, at most its bound."""

    value: float

    def update(self, mean_cost: float) -> None:
        """Move by the latest mean cost."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        ...


class LogMultiplier:
    """Gradient ascent on log lambda: log lambda <- log lambda + lr * lambda * (J_C - limit) (safe-rlhf).

    It can never be negative; its step shrinks with lambda, so a lambda near 0 comes back slowly.
    """

    def __init__(self, settings: PPOLagSettings) -> None:
        self.settings, self.log = settings, math.log(settings.lambda_init)

    @property
    def value(self) -> float:
        """Lambda."""
        return math.exp(self.log)

    def update(self, mean_cost: float) -> None:
        """One ascent step, kept under the bound."""
        self.log += self.settings.lambda_lr * self.value * (mean_cost - self.settings.cost_limit)
        self.log = min(self.log, math.log(self.settings.lambda_max))

    def state_dict(self) -> dict[str, Any]:
        """The logarithm."""
        return {"log_lambda": self.log}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.log = state["log_lambda"]


class PidMultiplier:
    """Lambda = clip(kp * error + integral + kd * rise, 0, bound) (Stooke et al. 2020, algorithm 2).

    The error J_C - limit and J_C itself are smoothed; the rise is how much smoothed J_C grew since the last update,
    0 while it falls. The integral starts at lambda_init and stays within 0 and the bound, so it cannot wind up.
    """

    def __init__(self, settings: PPOLagSettings) -> None:
        self.settings, self.value = settings, settings.lambda_init
        self.integral = settings.lambda_init
        self.error: float | None = None
        self.cost: float | None = None

    def update(self, mean_cost: float) -> None:
        """One step of the controller."""
        pid, bound = self.settings.pid, self.settings.lambda_max
        error = mean_cost - self.settings.cost_limit
        self.integral = min(max(self.integral + pid.ki * error, 0.0), bound)
        self.error = error if self.error is None else pid.smoothing * self.error + (1 - pid.smoothing) * error
        before = mean_cost if self.cost is None else self.cost
        self.cost = pid.smoothing * before + (1 - pid.smoothing) * mean_cost
        rise = max(0.0, self.cost - before)
        self.value = min(max(pid.kp * self.error + self.integral + pid.kd * rise, 0.0), bound)

    def state_dict(self) -> dict[str, Any]:
        """Lambda and the three terms behind it."""
        return {"value": self.value, "integral": self.integral, "error": self.error, "cost": self.cost}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.value, self.integral = state["value"], state["integral"]
        self.error, self.cost = state["error"], state["cost"]


def build_multiplier(settings: PPOLagSettings) -> LogMultiplier | PidMultiplier:
    """The multiplier that the settings name."""
    return PidMultiplier(settings) if settings.multiplier == "pid" else LogMultiplier(settings)
