"""Settings of the base step."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from components.settings import Compute, Optimizer, StepSettings, Training

Size = Literal["1m", "3m", "7m", "40m"]


class BaseSettings(StepSettings):
    """Where the base model comes from: a name, a folder, or a small one trained from text."""

    model: str = ""
    """A Hugging Face model name, a local folder or a gs:// address; empty trains a small model from text."""
    text: str = ""
    """A file to train it from, looked for among the raw data first, local or gs://: .jsonl of strings, {text} or
    {prompt, response}, or plain text with blank lines between documents. Empty takes the training rows of the data."""
    size: Size = "1m"
    """Size of the model trained from text: about so many parameters."""
    vocab_size: int = Field(2048, ge=300)
    """Tokens of the byte-level BPE trained on the text, at most."""
    max_positions: int = Field(1024, ge=32)
    """Longest sequence of the model trained from text."""
    test_share: float = Field(0.02, gt=0, lt=0.5)
    """Share of the documents held out to measure the loss."""
    training: Training = Training(
        epochs=1,
        batch_tokens=4096,
        max_length=256,
        optimizer=Optimizer(lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95)),
        compute=Compute(dtype="fp32"),
    )
    """How the small model is trained; unused when a model is given."""

    def sources(self) -> Iterator[tuple[str, str, str]]:
        """The model, or the text that one is trained from."""
        if self.model:
            yield ("model", "model", self.model)
        elif self.text:
            yield ("text", "file", self.text)
