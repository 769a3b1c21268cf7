"""What AdamW is given: the learning rate of every update, and parameters in groups by network and decay."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from components.gathering import shape_of
from components.settings import Optimizer

MAIN = ""
"""The network of the parameters that no name claims."""


def learning_rate_factor(update: int, total: int, settings: Optimizer) -> float:
    """The share of the peak rate at `update` (0-based) of `total`: linear warm-up, then the schedule."""
    warmup = math.ceil(settings.warmup * total)
    if update < warmup:
        return (update + 1) / warmup
    done = (update - warmup) / max(1, total - warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    floor = settings.min_lr if settings.schedule != "constant" else 0.0
    return floor + (1 - floor) * shape[settings.schedule]


def parameter_groups(model: nn.Module, settings: Mapping[str, Optimizer]) -> list[dict[str, Any]]:
    """Trainable parameters by network and decay: matrices decay, vectors (norms, biases) do not."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            network = name.partition(".")[0] if name.partition(".")[0] in settings else MAIN
            groups.setdefault((network, len(shape_of(parameter)) > 1), []).append(parameter)
    return [
        {
            "network": network,
            "params": parameters,
            "lr": settings[network].lr,
            "betas": settings[network].betas,
            "eps": settings[network].eps,
            "weight_decay": settings[network].weight_decay if is_matrix else 0.0,
        }
        for (network, is_matrix), parameters in groups.items()
    ]
