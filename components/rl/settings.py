"""Settings of the rl step: the loop's own; the algorithm's are a union on `name`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from components.rl.algorithm_settings import (
    AlgorithmSettings,
    DPOSettings,
    PPOLagSettings,
    PPOSettings,
    PreferenceLossSettings,
)
from components.settings import (
    Compute,
    Generation,
    Group,
    Lora,
    ModelScorerSettings,
    NativeSamplerSettings,
    Optimizer,
    OverlapSettings,
    SamplerSettings,
    ScorerSettings,
    StepSettings,
)


class PtxSettings(Group):
    """The SFT loss mixed into every update, against forgetting (InstructGPT; safe-rlhf's scripts)."""

    coef: float = Field(0.0, ge=0)
    """Weight of the mean token loss on demonstrations; 0 mixes nothing in (safe-rlhf's scripts: 16)."""
    batch_size: int = Field(16, ge=1)
    """Demonstrations per update."""


class AlertSettings(Group):
    """When the numbers of a run are worth an alert."""

    patience: int = Field(5, ge=1)
    """Rollouts in a row for which something must be wrong; a wrong ratio and a skipped update are told at once."""
    max_kl: float = Field(20.0, gt=0)
    """KL to the reference (k3) in nats per response; our own runs stay below 7."""
    max_missing_eos: float = Field(0.5, ge=0, le=1)
    """Share of the responses of a rollout that are cut at the length limit."""
    min_entropy: float = Field(0.01, ge=0)
    """Nats per token; below it nearly every response to a prompt is the same."""
    max_logprob_gap: float = Field(0.1, gt=0)
    """Mean difference, in nats per token, between the log-probabilities of sampler and trainer; ten times what bf16
    explains, and far below what other weights or another temperature make of it."""


class RLSettings(StepSettings):
    """Reinforcement learning from the reward (and cost) model, or preference optimisation without one."""

    algorithm: AlgorithmSettings = PPOLagSettings()
    """What is optimised, chosen by its name: ppo, ppo_lag, rloo, grpo, online_dpo, best_of_k or dpo."""
    rollouts: int = Field(1000, ge=1)
    """Batches to learn from: of fresh responses, or for dpo of pairs."""
    passes: float | None = Field(None, gt=0)
    """Where given, decides in place of `rollouts`: so many passes over the prompts (for dpo, the pairs)."""
    prompts_per_rollout: int = Field(128, ge=1)
    """Prompts (for dpo, pairs) in one such batch."""
    epochs: int = Field(1, ge=1)
    """Passes over each batch (safe-rlhf, async_rlhf: 1)."""
    minibatch_size: int = Field(128, ge=1)
    """Responses in one update."""
    micro_batch_size: int = Field(16, ge=1)
    """Responses of full length in one forward and backward pass, or as many shorter ones as take no more room; changes
    memory and speed, not the result."""
    generation: Generation = Generation()
    """How responses are sampled; the log-softmax of training uses the same temperature. dpo samples nothing: it takes
    the lengths from here and always computes at temperature 1."""
    optimizer: Optimizer = Optimizer(lr=1e-6)
    """AdamW for the policy. 1e-6 is OpenRLHF's and TRL's value for 7B models."""
    critic_optimizer: Optimizer = Optimizer(lr=5e-6)
    """AdamW for the critics, with a schedule and a clipping of their own (safe-rlhf: 5e-6)."""
    sampler: SamplerSettings = NativeSamplerSettings()
    """What samples responses: our own decoder, or a vLLM server, by `kind`."""
    max_weight: float = Field(2.0, ge=1)
    """Importance weights of what another engine, or older weights, sampled are cut to this (Yao et al. 2025: 2); 1
    only ever lowers."""
    overlap: OverlapSettings | None = None
    """Where given, a process of its own samples the next batches while one is learned from; absent samples in turn."""
    share_backbone: bool = False
    """Critics as small heads on the policy's hidden states, through which no gradient reaches the policy, instead of
    models of their own: far less memory, weaker critics. With `lora.rank` above 0, reward and cost models that were
    trained with adapters on the policy's own start are adapters and heads on the policy's backbone, too."""
    frozen_dtype: Literal["fp32", "bf16"] = "fp32"
    """The weights of reference, reward and cost model, where they are models of their own: bf16 halves their memory,
    and the KL to the reference then starts a little away from 0."""
    reward_scorer: ScorerSettings = ModelScorerSettings()
    """Where scores come from: the reward model, an ensemble, a function or a URL, by `kind`."""
    cost_scorer: ScorerSettings = ModelScorerSettings()
    """Where costs come from, likewise."""
    ptx: PtxSettings = PtxSettings()
    """The SFT loss mixed in."""
    compute: Compute = Compute()
    """How the arithmetic is done."""
    lora: Lora = Lora()
    """Adapters on the policy instead of full weights when the rank is above 0; the reference is then the policy with
    its adapters switched off."""
    checkpoint_every: int = Field(0, ge=0)
    """Rollouts between checkpoints; 0 writes one only when the step is asked to stop."""
    keep_checkpoints: int = Field(2, ge=1)
    """The newest so many checkpoints are kept; a damaged one is passed over for the one before it."""
    alerts: AlertSettings = AlertSettings()
    """When numbers are worth an alert."""

    @model_validator(mode="after")
    def _whole_pairs(self) -> Self:
        if isinstance(self.algorithm, PreferenceLossSettings) and self.minibatch_size % 2:
            raise ValueError(
                f"minibatch_size is {self.minibatch_size}; {self.algorithm.name} learns from pairs, which are two rows "
                "that stay together: make it even."
            )
        return self

    @model_validator(mode="after")
    def _samples_what_it_overlaps(self) -> Self:
        if self.overlap is not None and isinstance(self.algorithm, DPOSettings):
            raise ValueError(
                "overlap is set and algorithm.name is dpo, which learns from labelled pairs and samples nothing ahead: "
                "leave overlap out, or take an algorithm that samples."
            )
        return self

    @model_validator(mode="after")
    def _overlaps_alone(self) -> Self:
        processes = self.compute.nodes * self.compute.processes
        if self.overlap is not None and processes > 1:
            raise ValueError(
                f"overlap is set and compute starts {processes} processes, each of which would sample "
                "ahead for itself: leave overlap out, or train in one. A vLLM server samples for any number of them."
            )
        return self

    @property
    def teachers(self) -> tuple[str, ...]:
        """The scalar models that the algorithm learns from."""
        if isinstance(self.algorithm, DPOSettings):
            return ()
        return ("reward", "cost") if isinstance(self.algorithm, PPOLagSettings) else ("reward",)

    @property
    def critics(self) -> tuple[str, ...]:
        """The critics that the algorithm trains beside the policy."""
        if isinstance(self.algorithm, PPOLagSettings):
            return ("value", "cost_value")
        return ("value",) if isinstance(self.algorithm, PPOSettings) else ()
