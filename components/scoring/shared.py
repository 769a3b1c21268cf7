"""Scalar models on the policy's backbone: an adapter and a head each, where they were trained on the same model.

Shapes: N places.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from components.adapters import OWN, add_guest, switched
from components.artifacts import ADAPTER, ModelCard
from components.models import normalised
from components.packed import Packed, backbone
from components.ranks import ALONE, Ranks
from components.scoring.model import ModelScorer, as_scorer

logger = logging.getLogger(__name__)


class GuestModel:
    """A scalar model that is a guest on another model; what `ScalarModel` computes, to rounding.

    The merged model rounds weight and adapter as one sum, this one multiplies by them apart.
    """

    def __init__(self, host: Any, name: str, head: nn.Module, mean: float, std: float) -> None:
        self.model, self.name, self.head, self.mean, self.std = host, name, head, mean, std

    def __call__(self, packed: Packed, places: Tensor) -> Tensor:
        """Normalised scores (N,) at some places of what is read."""
        with switched(self.model, self.name):
            hidden = backbone(self.model)(**packed.inputs())[0].flatten(0, 1)[places]
        return normalised(self.head, hidden, self.mean, self.std)


class SharedBackbone:
    """Loads scorers as guests on a model with adapters, where they fit, and else as models of their own."""

    def __init__(
        self, host: Any, digest: str, otherwise: Callable[[Path], ModelScorer], ranks: Ranks = ALONE
    ) -> None:
        """`digest` is that of the folder that `host` started from; `otherwise` loads what does not fit.

        `ranks` are the processes that share the scorers' batches, and perhaps the weights of `host`.
        """
        self.host, self.digest, self.otherwise, self.ranks = host, digest, otherwise, ranks

    def load(self, folder: Path) -> ModelScorer:
        """The scorer in a reward or cost model's folder."""
        if reason := self._misfit(folder):
            logger.info("%s is loaded as a model of its own: %s", folder, reason)
            return self.otherwise(folder)
        name, card = f"guest_{len(self.host.peft_config)}", ModelCard.read(folder)
        head = add_guest(self.host, folder / ADAPTER, name)
        logger.info("%s shares the policy's backbone", folder)
        guest = GuestModel(self.host, name, head, card.score_mean, card.score_std)
        return as_scorer(guest, folder, ranks=self.ranks)

    def _misfit(self, folder: Path) -> str:
        """Why a scorer cannot be a guest; nothing where it can."""
        if OWN not in getattr(self.host, "peft_config", {}):
            return "the policy's own weights are trained (rl.lora.rank is 0)"
        if not (folder / ADAPTER).exists():
            return "it was trained without adapters (lora.rank is 0), or by an earlier version"
        if (base := ModelCard.read(folder).base) != self.digest:
            return f"it was trained on another model than the policy ({base[:12]}, not {self.digest[:12]})"
        return ""
