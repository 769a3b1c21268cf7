"""Where training stands, and the batch that a checkpoint finds half learned from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from components.artifacts import Metrics
from components.checkpoints import Checkpoint
from components.rl.types import Batch
from components.tracking import Row

PENDING = "batch."
"""Before the names of the tensors of a batch that a checkpoint finds half learned from."""


@dataclass
class Course:
    """Where training stands."""

    number: int = 0
    """Batches that are done."""
    batch: Batch | None = None
    """The one being learned from."""
    updates: list[Metrics] = field(default_factory=list)
    """What each update on it measured."""
    history: list[Row] = field(default_factory=list)
    """The numbers of every batch."""
    scatter: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Reward and cost of the responses of the first and of the last rollout."""


def pending(checkpoint: Checkpoint, device: torch.device) -> Batch | None:
    """The batch that was being learned from when the checkpoint was written, on `device`."""
    if "batch" not in checkpoint.values:
        return None
    tensors: dict[str, Any] = {
        name.removeprefix(PENDING): tensor.to(device)
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(PENDING)
    }
    values = checkpoint.values["batch"]
    return Batch(**tensors, **(values | {"scatter": points(values["scatter"])}))


def points(pairs: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Pairs as they were before JSON made lists of them."""
    return [(reward, cost) for reward, cost in pairs]
