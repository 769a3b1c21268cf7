"""Online DPO: DPO on the best and the worst of several responses just sampled to the same prompt."""

from typing import Literal

import torch
from torch import Tensor

from components.rl.algorithm_settings import OnlineDPOSettings
from components.rl.algorithms.dpo import PairLearner
from components.rl.functional import eos_rule
from components.rl.types import Batch, Rollout


class OnlineDPO(PairLearner):
    """The first of the best is chosen, the first of the worst rejected (Guo et al. 2024, algorithm 1).

    Groups whose scores are all equal, or whose two responses are the same text, say nothing: they are dropped, and
    the share of those that stay is logged.
    """

    settings: OnlineDPOSettings
    rows_per_prompt = 2
    ratio: Literal["token", "sequence"] | None = None

    def __init__(self, settings: OnlineDPOSettings) -> None:
        super().__init__(settings)
        self.group_size = settings.group_size

    def targets(self, rollout: Rollout) -> Batch:
        """The informative pairs, chosen and rejected in turn."""
        settings = self.settings
        scores = eos_rule(rollout.scores, rollout.ended, settings.missing_eos, settings.missing_eos_penalty)
        groups = scores.clamp(-settings.score_clip, settings.score_clip).view(-1, rollout.group_size)
        starts = torch.arange(len(groups), device=scores.device) * rollout.group_size
        chosen, rejected = starts + groups.argmax(1), starts + groups.argmin(1)
        informative = (groups.amax(1) > groups.amin(1)) & ~same_response(rollout, chosen, rejected)
        pairs = torch.stack([chosen, rejected], dim=1)[informative]
        whole = Batch.of(rollout, ref_logprobs=rollout.ref_logprobs, unit=2)
        batch = whole.rows(pairs.flatten())
        batch.metrics["rollout/informative_pairs"] = float(informative.float().mean())
        return batch


def same_response(rollout: Rollout, first: Tensor, second: Tensor) -> Tensor:
    """Whether rows `first` and `second` (N,) of a rollout hold the same tokens under their masks."""
    responses = rollout.input_ids[:, -rollout.mask.shape[1] :].masked_fill(~rollout.mask, -1)
    return (responses[first] == responses[second]).all(1)
