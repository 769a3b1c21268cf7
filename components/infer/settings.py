"""Settings of the infer step."""

from collections.abc import Iterator

from pydantic import Field

from components.settings import Generation, StepSettings


class InferSettings(StepSettings):
    """The prompts answered with the deployed model."""

    prompts: str = ""
    """A .jsonl, .json or .txt file (a prompt per line), local or gs://; empty takes the data's test prompts."""
    limit: int = Field(32, ge=1)
    """How many of the data's test prompts are answered; a file of your own is answered whole."""
    generation: Generation = Generation()
    """How responses are sampled, and how many at once."""

    def sources(self) -> Iterator[tuple[str, str, str]]:
        """The file of prompts, where there is one."""
        if self.prompts:
            yield ("prompts", "file", self.prompts)
