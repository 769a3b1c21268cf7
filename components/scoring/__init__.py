"""Scores for (prompt, response) pairs: from one model, an ensemble, a Python function or a URL."""

from collections.abc import Callable
from pathlib import Path

from components.artifacts import ModelCard
from components.errors import InputError
from components.scoring.ensemble import EnsembleScorer, load_ensemble
from components.scoring.function import FunctionScorer
from components.scoring.model import ModelScorer, load_scorer
from components.scoring.scorer import Role, Scorer
from components.scoring.shared import SharedBackbone
from components.settings import (
    EnsembleScorerSettings,
    FunctionScorerSettings,
    ScorerSettings,
    UrlScorerSettings,
)

__all__ = [
    "EnsembleScorer", "FunctionScorer", "ModelScorer", "Role", "Scorer", "SharedBackbone", "build_scorer",
    "load_scorer",
]  # fmt: skip


def build_scorer(
    settings: ScorerSettings, folder: Path | None, role: Role, load: Callable[[Path], Scorer] = load_scorer
) -> Scorer:
    """The scorer that the settings describe; `folder` is the reward or cost model's, where one was trained.

    `load` makes a scorer of a folder with a scalar model.

    Raises InputError when a model is needed and there is none, or it is of the other kind, and for a function that
    cannot be found or a token that is not set.
    """
    if isinstance(settings, FunctionScorerSettings):
        return FunctionScorer(settings.name, role)
    if isinstance(settings, UrlScorerSettings):
        from components.scoring.remote import RemoteScorer

        return RemoteScorer(settings, role)
    if folder is None:
        raise InputError(
            f"rl.{role}_scorer.kind is {settings.kind}: it needs a {role} model and none was given. Give one, or set "
            "kind to function or url."
        )
    if (kind := ModelCard.read(folder).kind) != role:
        raise InputError(f"{folder}: card.json says kind {kind!r}; accepted for rl.{role}_scorer: a {role} model.")
    if isinstance(settings, EnsembleScorerSettings):
        return load_ensemble(folder, settings, role, load)
    return load(folder)
