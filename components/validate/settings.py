"""Settings of validate: what the data and the base model must satisfy before anything is trained."""

from typing import Literal

from pydantic import Field

from components.records import Dimension
from components.settings import StepSettings


class ValidateSettings(StepSettings):
    """What counts as an error, and how much of it is listed."""

    max_length: int = Field(512, ge=8)
    """Tokens of prompt and response together that training will use; as sft.training.max_length."""
    overlong: Literal["error", "warn"] = "error"
    """A response of `max_length` tokens or more, which leaves its prompt no room and loses its own end."""
    max_truncated: float = Field(0.2, ge=0, le=1)
    """Share of a kind's rows that may be longer than `max_length`; beyond it the setting is too small."""
    min_train: int = Field(1, ge=0)
    """Rows each kind needs to train on: demonstrations for sft, preferences for reward, prompts for rl."""
    min_test: int = Field(1, ge=0)
    """Preferences and prompts needed to measure on; too few demonstrations only make a warning."""
    dimensions: tuple[Dimension, ...] = ("helpful", "harmless")
    """Dimensions that need preferences in both splits: what reward and, for ppo_lag, cost learn from."""
    max_findings: int = Field(100, ge=1)
    """Findings listed in the report for each check; all are counted."""
