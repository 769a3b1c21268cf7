"""Scores from several models that were trained alike: their mean, their worst, or a bound on what they say.

Where the models disagree, a high score may be a mistake of one of them that the policy learns to exploit; a careful
aggregate takes that incentive away (Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization";
their WCO is `worst`, and their UWO, which subtracts the variance, is `bound` but for the square).

Shapes: M members, B responses.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from components.artifacts import Metrics, member_folders
from components.errors import InputError
from components.generation import Response
from components.records import Conversation
from components.scoring.scorer import Role, Scorer
from components.settings import EnsembleScorerSettings


class EnsembleScorer:
    """Several scorers as one; `metrics` holds their disagreement about the last responses."""

    def __init__(self, members: Sequence[Scorer], settings: EnsembleScorerSettings, role: Role) -> None:
        self.members, self.settings, self.role = members, settings, role
        self.metrics: Metrics = {}

    def score(self, prompts: Sequence[Conversation], responses: Sequence[Response]) -> Tensor:
        """The aggregate (B,) of the members' scores."""
        scores = torch.stack([member.score(prompts, responses) for member in self.members])  # (M, B)
        self.metrics = {f"rollout/{self.role}_disagreement": disagreement(scores)} if responses else {}
        return aggregated(scores, self.settings, self.role)


def disagreement(scores: Tensor) -> float:
    """The standard deviation between members' scores (M, B), averaged over responses; in the scores' own unit."""
    return float(scores.std(dim=0, unbiased=False).mean())


def aggregated(scores: Tensor, settings: EnsembleScorerSettings, role: Role) -> Tensor:
    """One score (B,) from the members' (M, B).

    `mean`; `worst`: the lowest reward, the highest cost; `bound`: the mean minus `k` standard deviations for
    rewards, plus for costs. The deviation is that of the members at hand (divided by M).
    """
    worse = -1 if role == "reward" else 1
    if settings.aggregate == "worst":
        return worse * (worse * scores).amax(dim=0)
    mean = scores.mean(dim=0)
    return mean if settings.aggregate == "mean" else mean + worse * settings.k * scores.std(dim=0, unbiased=False)


def load_ensemble(
    folder: Path, settings: EnsembleScorerSettings, role: Role, load: Callable[[Path], Scorer]
) -> EnsembleScorer:
    """The ensemble in a model's folder: the model itself and its members, each loaded by `load`.

    Raises InputError when the folder holds one model alone.
    """
    members = member_folders(folder)
    if not members:
        raise InputError(
            f"rl.{role}_scorer.kind is ensemble, but {folder} holds one model. Set {role}.members to 2 or more and "
            "train it again, or take kind model."
        )
    return EnsembleScorer([load(member) for member in (folder, *members)], settings, role)
