"""Settings of the sft step."""

from components.settings import Compute, Lora, Optimizer, StepSettings, Training


class SFTSettings(StepSettings):
    """Supervised fine-tuning on demonstrations."""

    training: Training = Training(
        epochs=3, batch_tokens=8192, optimizer=Optimizer(lr=2e-5, warmup=0.03), compute=Compute()
    )
    """How long and how. 3 epochs at 2e-5 are safe-rlhf's values for 7B models."""
    lora: Lora = Lora()
    """Adapters instead of full weights when the rank is above 0."""
