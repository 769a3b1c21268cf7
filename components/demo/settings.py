"""Settings of the demo data: how much of it there is and how noisy its labels are."""

from pydantic import Field

from components.settings import StepSettings


class DemoSettings(StepSettings):
    """How much data the demo world gives; what is true in it never changes."""

    num_corpus: int = Field(9000, ge=20)
    """Rows of corpus.jsonl, the text for a base model. At the default every fact stands there 10 times."""
    num_demonstrations: int = Field(4000, ge=20)
    """Rows of demonstrations.json. At the default every fact is answered rightly at least once."""
    num_pairs: int = Field(6000, ge=20)
    """Pairs of responses; preferences.jsonl has two rows for each, one per dimension."""
    num_prompts: int = Field(2000, ge=20)
    """Rows of prompts.jsonl, the training prompts for reinforcement learning."""
    num_test_prompts: int = Field(520, ge=20)
    """Rows of test_prompts.jsonl, all held out. 520 gives the harmful share to about 4 points."""
    label_noise: float = Field(0.07, ge=0, lt=0.5)
    """Share of labels that are wrong. 0.07 is less than between people: tiny models must learn."""
