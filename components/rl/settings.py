"""Settings of the rl step: the loop's own and, as a union on `name`, the algorithm's."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from components.settings import Compute, Generation, Group, Lora, Optimizer, StepSettings


class PPOSettings(Group):
    """Proximal policy optimisation with a learned critic and a KL penalty inside the reward."""

    name: Literal["ppo"] = "ppo"
    """Which algorithm this is."""
    kl_coef: float = Field(0.02, ge=0)
    """Weight of the KL penalty to the reference, per token (safe-rlhf: 0.02; async_rlhf: 0.05)."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Estimator inside the reward: k1 is unbiased, k3 never negative (Schulman 2020)."""
    clip: float = Field(0.2, gt=0)
    """The ratio is clipped to 1 - clip .. 1 + clip (PPO, 2017)."""
    value_clip: float = Field(0.2, gt=0)
    """Values move at most this far from those of the rollout, in normalised score units (async_rlhf: 0.2)."""
    value_coef: float = Field(0.5, gt=0)
    """Weight of the critic's loss beside the policy's."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's bias against variance."""
    score_clip: float = Field(10.0, gt=0)
    """Scores are clamped to this size before the KL is added, never the KL (OpenRLHF: 10)."""
    whiten_advantages: bool = True
    """Advantages to mean 0 and deviation 1 over all response tokens of the global batch; safe-rlhf does not."""
    missing_eos: Literal["penalty", "replace", "none"] = "penalty"
    """A response cut at the limit: subtract `missing_eos_penalty` from its score, replace the score by its
    negative, or nothing (TRL subtracts, async_rlhf replaces, safe-rlhf does nothing)."""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """In normalised score units."""


class PPOLagSettings(PPOSettings):
    """PPO under a cost limit, with a Lagrange multiplier (safe-rlhf's PPO-Lag)."""

    name: Literal["ppo_lag"] = "ppo_lag"  # type: ignore[assignment]
    """Which algorithm this is."""
    kl_coef: float = Field(0.01, ge=0)
    """As for PPO; it enters both streams in full, so safe-rlhf halves it to 0.01."""
    cost_limit: float = 0.0
    """The mean cost of a response to stay under, in units of the cost model's deviation; 0 is its boundary."""
    lambda_init: float = Field(1.0, gt=0)
    """First value of the multiplier."""
    lambda_lr: float = Field(0.1, gt=0)
    """Step of gradient ascent on log lambda, taken once per rollout."""
    lambda_max: float = Field(5.0, gt=0)
    """Upper bound of the multiplier (safe-rlhf's script: 5)."""
    cost_window: int = Field(128, ge=1)
    """The mean cost is taken over so many of the latest responses, per process."""
    lambda_delay: int = Field(0, ge=0)
    """Rollouts before the multiplier first moves."""

    @model_validator(mode="after")
    def _within_bound(self) -> Self:
        if self.lambda_init > self.lambda_max:
            raise ValueError(f"lambda_init {self.lambda_init} is above lambda_max {self.lambda_max}; lower it.")
        return self


AlgorithmSettings = Annotated[PPOSettings | PPOLagSettings, Field(discriminator="name")]


class RLSettings(StepSettings):
    """Reinforcement learning from the reward (and cost) model."""

    algorithm: AlgorithmSettings = PPOLagSettings()
    """What is optimised, chosen by its name: ppo or ppo_lag."""
    rollouts: int = Field(1000, ge=1)
    """Batches of fresh responses to learn from."""
    prompts_per_rollout: int = Field(128, ge=1)
    """Prompts in one such batch."""
    epochs: int = Field(1, ge=1)
    """Passes over each batch (safe-rlhf, async_rlhf: 1)."""
    minibatch_size: int = Field(128, ge=1)
    """Responses in one update."""
    micro_batch_size: int = Field(16, ge=1)
    """Responses in one forward and backward pass; changes memory and speed, not the result."""
    generation: Generation = Generation()
    """How responses are sampled; the log-softmax of training uses the same temperature."""
    optimizer: Optimizer = Optimizer(lr=1e-6)
    """AdamW for the policy. 1e-6 is OpenRLHF's and TRL's value for 7B models."""
    critic_lr: float = Field(5e-6, gt=0)
    """Peak learning rate of the critics (safe-rlhf: 5e-6)."""
    compute: Compute = Compute()
    """How the arithmetic is done."""
    lora: Lora = Lora()
    """Adapters on the policy instead of full weights when the rank is above 0."""
    checkpoint_every: int = Field(0, ge=0)
    """Rollouts between checkpoints, from which an interrupted step continues; 0 writes none."""

    @property
    def needs_cost(self) -> bool:
        """Whether the algorithm learns from a cost model, so that the pipeline trains one."""
        return isinstance(self.algorithm, PPOLagSettings)
