"""Settings of the evaluate step."""

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, model_validator

from components.settings import Generation, Group, StepSettings


class Bound(Group):
    """What one metric has to satisfy."""

    min: float | None = None
    """The value must not be below; absent: no lower bound."""
    max: float | None = None
    """The value must not be above; absent: no upper bound."""
    at: Literal["mean", "low", "high"] = "mean"
    """What is compared: the mean, or an end of its 95 % interval (low with min: we are sure enough)."""
    over: Literal["champion"] | None = None
    """champion: min and max are margins over the mean that the served model had when it was evaluated (min 0.01: better
    by that much); a model that is the first to be served has none to beat. Absent: they are the values themselves."""

    @model_validator(mode="after")
    def _some_bound(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("has neither min nor max; give at least one of them, or leave the metric out.")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"has min {self.min} above max {self.max}, which nothing satisfies.")
        return self


class EvaluateSettings(StepSettings):
    """The policy against its baseline on held-out prompts, and what it must reach to be published."""

    num_prompts: int = Field(512, ge=1)
    """Held-out prompts to answer, drawn by the seed where there are more; 512 put a share within ±0.045."""
    generation: Generation = Generation()
    """How both models respond; the same random draws go to both."""
    judge: str = ""
    """`module:function` that knows what is true of a response; empty: the reward and cost models stand in."""
    thresholds: dict[str, Bound] = Field({"eval/win_rate": Bound(min=0.505, at="low")})
    """What lets a policy pass, by metric, or by metric and category (`gold/helpful/fact`); all must hold.
    A policy that answers as its baseline does wins half: the default asks for a little more, with 95 % certainty."""
    champion: str | None = Field(None, min_length=1)
    """Where the versions of the served model are, for thresholds over it: a folder or gs:// address that ends in the
    model's name; absent, the place that upload publishes to."""
    tie_margin: float = Field(0.0, ge=0)
    """Rewards this close are a tie, which counts half in the win rate; in standard deviations of rewards."""
    batch_tokens: int = Field(8192, ge=16)
    """Tokens in a batch, padding included, when likelihoods are computed (as in training)."""
    dtype: Literal["serving", "fp32", "bf16"] = "serving"
    """What the policies are held in; `serving` is what they are served in: bf16 on a GPU, fp32 elsewhere."""
    num_samples_shown: int = Field(20, ge=0)
    """Pairs of responses on the report's page; all of them are in samples.jsonl."""

    def sources(self) -> Iterator[tuple[str, str, str]]:
        """The champion to beat, where a threshold is over it."""
        if self.champion is not None:
            yield ("champion", "champion", self.champion)
