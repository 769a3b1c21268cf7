"""Settings of the reward step, which trains reward and cost models."""

from typing import Literal

from pydantic import Field

from components.records import Dimension
from components.settings import Compute, Lora, Optimizer, StepSettings, Training


class RewardSettings(StepSettings):
    """A scalar model trained on preferences."""

    kind: Literal["reward", "cost"] = "reward"
    """A reward is higher for the better response; a cost is higher for the worse, and above 0 when it is unsafe."""
    dimension: Dimension = "helpful"
    """The preferences to learn from: helpful or harmless."""
    regularization: float = Field(0.001, ge=0)
    """Weight of the mean squared score, which keeps scores near zero (safe-rlhf's scripts: 0.001)."""
    training: Training = Training(
        epochs=2,
        batch_tokens=8192,
        optimizer=Optimizer(lr=2e-5, warmup=0.03, weight_decay=0.1),
        compute=Compute(),
    )
    """How long and how. 2 epochs at 2e-5 with decay 0.1 are safe-rlhf's values for 7B models."""
    normalization_pairs: int = Field(2000, ge=2)
    """Training pairs whose scores give the mean and standard deviation stored with the model."""
    members: int = Field(1, ge=1)
    """Models to train: above 1 an ensemble for a scorer of that kind (Coste et al. 2023: 5). The first is the same
    whatever their number; each further one learns from another bootstrap resample of the pairs."""
    normalize: bool = True
    """Store the mean (for rewards) and deviation of training scores with the model, which then gives scores of mean
    0 and deviation 1; off gives them as they are (safe-rlhf's scripts)."""
    lora: Lora = Lora()
    """Adapters instead of full weights when the rank is above 0; the head is always trained."""
