"""Settings of preprocess: which files hold the feedback, in what proportions, and how they are split."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from components.records import Dimension
from components.settings import Group, StepSettings

Format = Literal["auto", "response", "pair", "prompt", "messages", "hh", "safe-rlhf"]


class Source(Group):
    """One file or folder of rows."""

    path: str = Field(min_length=1)
    """Local or gs://, a file or a folder of files; looked up in the `raw` input first."""
    format: Format = "auto"
    """Form of the rows; auto decides by the first row's keys."""
    weight: float | None = Field(None, gt=0)
    """Proportion among the sources of its kind (1 where others have one); without any, every row is taken."""
    dimension: Dimension | None = None
    """What the labels of this source judge, where its rows do not say; absent: preprocess.dimension."""
    split: Literal["train", "test"] | None = None
    """Puts every prompt of this source into one split; absent: by the hash of the prompt."""


def _as_sources(value: Any) -> Any:
    """Sources from what people type: one path, one source, or a list of either."""
    if value is None:
        return ()
    if isinstance(value, str | Mapping | Source):
        value = [value]
    if isinstance(value, list | tuple):
        return [{"path": item} if isinstance(item, str) else item for item in value]
    return value


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources)]


class PreprocessSettings(StepSettings):
    """Which files hold the feedback, and how they become training data."""

    demonstrations: Sources = ()
    """Prompts with a response to imitate; without any, the chosen responses of the preferences."""
    preferences: Sources = ()
    """Pairs of responses, one of them chosen."""
    prompts: Sources = ()
    """Prompts to answer while training and evaluating; without any, the prompts of the preferences."""
    dimension: Dimension = "helpful"
    """What a preference judges when neither its row nor its source says so."""
    test_share: float = Field(0.1, ge=0, lt=1)
    """Share of prompts kept for testing; chosen by a hash of the prompt, so all its rows go together."""

    def sources(self) -> Iterator[tuple[str, str, str]]:
        """The sources of every kind."""
        for kind in ("demonstrations", "preferences", "prompts"):
            for number, source in enumerate(getattr(self, kind)):
                yield (f"{kind}.{number}.path", "file", source.path)
