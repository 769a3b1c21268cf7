"""The algorithms, one file each; `build` finds the one the settings name."""

from components.rl.algorithms.ppo import PPO
from components.rl.algorithms.ppo_lag import PPOLag
from components.rl.functional import Total
from components.rl.settings import PPOLagSettings, PPOSettings
from components.rl.types import Algorithm


def build(settings: PPOSettings | PPOLagSettings, total: Total) -> Algorithm:
    """The algorithm that the settings name; `total` adds tensors up over all processes."""
    if isinstance(settings, PPOLagSettings):
        return PPOLag(settings, total)
    return PPO(settings, total)
