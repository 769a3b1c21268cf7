"""DPO: the policy learns from pairs that people labelled, with the reference in place of a reward model."""

from typing import Any

import torch
from torch import Tensor

from components.rl.algorithm_settings import PreferenceLossSettings
from components.rl.functional import preference_loss, sequence_sums
from components.rl.types import Batch, Forward, Means


class PairLearner:
    """Rows come in units of two, chosen then rejected; whole responses are compared.

    Tokens that both responses begin with cancel out of the difference, so nothing has to be cut away.
    """

    def __init__(self, settings: PreferenceLossSettings) -> None:
        self.settings = settings

    def terms(self, batch: Batch) -> float:
        """Pairs."""
        return len(batch) / 2

    def loss(self, batch: Batch, forward: Forward) -> tuple[Tensor, Means]:
        """The preference loss, summed over pairs."""
        assert batch.ref_logprobs is not None and batch.unit == 2
        settings, pairs = self.settings, self.terms(batch)
        ratios = sequence_sums(forward.logprobs, batch.mask) - sequence_sums(batch.ref_logprobs, batch.mask)
        chosen, rejected = ratios[0::2], ratios[1::2]
        total = preference_loss(chosen, rejected, settings.beta, settings.loss, settings.label_smoothing).sum()
        with torch.no_grad():
            margin = chosen - rejected
            likelihood = sequence_sums(forward.logprobs, batch.mask)[0::2]
            means = {
                "loss/policy": (total.item(), pairs),
                "policy/pair_accuracy": (float((margin > 0).sum()), pairs),
                "policy/margin": (settings.beta * margin.sum().item(), pairs),
                "policy/chosen_reward": (settings.beta * chosen.sum().item(), pairs),
                "policy/rejected_reward": (settings.beta * rejected.sum().item(), pairs),
                "policy/chosen_logprob": (likelihood.sum().item(), pairs),
                "policy/entropy": (
                    forward.entropy.detach().masked_fill(~batch.mask, 0.0).sum().item(),
                    float(batch.mask.sum()),
                ),
            }
        return total, means

    def state_dict(self) -> dict[str, Any]:
        """There is no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""


class DPO(PairLearner):
    """Pairs as people labelled them (Rafailov et al. 2023, equation 7)."""
