"""What every step's settings share: the strict base class and the groups that several steps use.

Precedence is decided in `pipeline/overrides.py`: class defaults < configuration files < `key=value`.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Group(BaseModel):
    """A frozen set of settings in which an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class StepSettings(Group):
    """What every step has: a seed, from which it derives every random choice."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of this step's random choices; below 2^31, because Kubeflow carries numbers as doubles."""


class Optimizer(Group):
    """AdamW, its schedule and its clipping."""

    lr: float = Field(1e-5, gt=0)
    """Peak learning rate. 1e-5 is safe-rlhf's actor rate for 7B models; tiny models want 1e-3."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment (safe-rlhf, OpenRLHF)."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's denominator term."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay; not applied to vectors (norms, biases)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up, over updates."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of all updates in which the rate rises from zero (safe-rlhf: 0.03)."""
    min_lr: float = Field(0.1, ge=0, le=1)
    """Where the schedule ends, as a share of `lr` (OpenRLHF: 0.1)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm. 1.0 everywhere; async_rlhf clips nothing, a known defect."""
    max_skipped: int = Field(10, ge=0)
    """Updates in a row that may be skipped for a loss or gradient that is not finite; one more fails the step."""


class Compute(Group):
    """How the arithmetic is done."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps float32 weights and computes in bfloat16; fp16 is not offered."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""


class Training(Group):
    """Supervised training: how long, on how much at once, checked how often."""

    epochs: int = Field(1, ge=1)
    """Passes over the training rows."""
    batch_tokens: int = Field(8192, ge=16)
    """Tokens in a micro-batch, padding included; rows are sorted by length so that little is padding."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches in one update."""
    max_length: int = Field(512, ge=8)
    """Tokens of prompt and response together; prompts lose their oldest tokens, responses their last."""
    eval_every: int = Field(0, ge=0)
    """Updates between evaluations on the test split; 0 evaluates at the end only."""
    checkpoint_every: int = Field(0, ge=0)
    """Updates between checkpoints, from which an interrupted step continues; 0 writes one on SIGTERM alone."""
    keep_checkpoints: int = Field(2, ge=1)
    """The newest so many checkpoints are kept; a damaged one is passed over for the one before it."""
    optimizer: Optimizer = Optimizer()
    """AdamW, its schedule and its clipping."""
    compute: Compute = Compute()
    """How the arithmetic is done."""


class Lora(Group):
    """Low-rank adapters; the saved model has them merged, so that any tool loads it."""

    rank: int = Field(0, ge=0)
    """Rank of the adapters; 0 trains the full weights."""
    alpha: int = Field(16, gt=0)
    """Scale of the adapters: the update is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout inside the adapters; 0 keeps the first update's ratio at 1."""


class Generation(Group):
    """How responses are sampled."""

    max_prompt_tokens: int = Field(512, ge=1)
    """Longer prompts lose their oldest tokens."""
    max_new_tokens: int = Field(128, ge=1)
    """A response ends at the end-of-sequence token or after this many tokens."""
    temperature: float = Field(1.0, ge=0)
    """1.0 samples the policy as it is; 0 takes the likeliest token."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus: the smallest set of tokens with this probability; 1.0 keeps all."""
    top_k: int = Field(0, ge=0)
    """Only the k likeliest tokens; 0 keeps all."""
    batch_size: int = Field(64, ge=1)
    """Responses decoded at once."""
