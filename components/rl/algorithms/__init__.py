"""The algorithms, one file each; `build` finds the one the settings name."""

from components.rl.algorithm_settings import (
    AlgorithmSettings,
    BestOfKSettings,
    DPOSettings,
    GRPOSettings,
    OnlineDPOSettings,
    PPOLagSettings,
    RLOOSettings,
)
from components.rl.algorithms.best_of_k import BestOfK
from components.rl.algorithms.dpo import DPO
from components.rl.algorithms.grpo import GRPO
from components.rl.algorithms.online_dpo import OnlineDPO
from components.rl.algorithms.ppo import PPO
from components.rl.algorithms.ppo_lag import PPOLag
from components.rl.algorithms.rloo import RLOO
from components.rl.functional import Total
from components.rl.types import Algorithm


def build(settings: AlgorithmSettings, total: Total, max_new_tokens: int) -> Algorithm | DPO:
    """The algorithm that the settings name; `total` adds tensors up over all processes."""
    match settings:
        case PPOLagSettings():
            return PPOLag(settings, total, max_new_tokens)
        case RLOOSettings():
            return RLOO(settings, total)
        case GRPOSettings():
            return GRPO(settings, total, max_new_tokens)
        case OnlineDPOSettings():
            return OnlineDPO(settings)
        case BestOfKSettings():
            return BestOfK(settings, max_new_tokens)
        case DPOSettings():
            return DPO(settings)
        case _:
            return PPO(settings, total, max_new_tokens)
