"""Settings of the algorithms, a union on `name`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from components.records import Dimension
from components.settings import Group

Normalization = Literal["token", "sequence", "constant"]
"""What a summed token loss is divided by: the update's response tokens; each response's length and then the
responses; or the responses times a constant."""


class OnlineSettings(Group):
    """What every algorithm has that learns from responses it samples."""

    score_clip: float = Field(10.0, gt=0)
    """Scores are clamped to this size before any KL is added, never the KL (OpenRLHF: 10)."""
    missing_eos: Literal["penalty", "replace", "none"] = "penalty"
    """A response cut at the limit: subtract `missing_eos_penalty` from its score, replace the score by its
    negative, or nothing (TRL subtracts, async_rlhf replaces, safe-rlhf does nothing)."""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """In normalised score units."""


class PolicyGradientSettings(OnlineSettings):
    """What every algorithm has that follows a policy gradient under a KL penalty."""

    kl_coef: float = Field(0.02, ge=0)
    """Weight of the KL penalty to the reference, per token (safe-rlhf: 0.02; async_rlhf: 0.05)."""
    kl_target: float | None = Field(None, gt=0)
    """KL per response, in nats, that `kl_coef` is steered to; absent keeps it as it is (Ziegler et al. 2019)."""
    kl_horizon: int = Field(10_000, ge=1)
    """Responses over which the steering acts (OpenRLHF: 10000)."""
    clip: float = Field(0.2, gt=0, lt=1)
    """The ratio is clipped to 1 - clip .. 1 + clip (PPO, 2017)."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus per token; 0 in every source."""


class TokenRatioSettings(PolicyGradientSettings):
    """What algorithms have whose ratio is taken token by token."""

    clip_high: float | None = Field(None, gt=0)
    """Upper bound 1 + clip_high in place of 1 + clip; not part of PPO (clip-higher, DAPO 2025)."""
    dual_clip: float | None = Field(None, gt=1)
    """With a negative advantage the objective is at least dual_clip * A; not part of PPO (verl: 3)."""
    normalization: Normalization = "token"
    """`token` divides by the update's response tokens, `sequence` averages inside each response first,
    `constant` divides by responses times `normalization_constant`."""
    normalization_constant: int | None = Field(None, ge=1)
    """For `constant`; absent takes generation.max_new_tokens (Dr. GRPO)."""


class PPOSettings(TokenRatioSettings):
    """Proximal policy optimisation with a learned critic and a KL penalty inside the reward."""

    name: Literal["ppo"] = "ppo"
    """Which algorithm this is."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Estimator inside the reward: k1 is unbiased, k3 never negative (Schulman 2020)."""
    value_clip: float = Field(0.2, gt=0)
    """Values move at most this far from those of the rollout, in normalised score units (async_rlhf: 0.2)."""
    value_coef: float = Field(0.5, gt=0)
    """Weight of the critic's loss beside the policy's."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's bias against variance."""
    whiten_rewards: bool = False
    """Token rewards to deviation 1 over the global batch, their mean kept (async_rlhf's option)."""
    whiten_advantages: bool = True
    """Advantages to mean 0 and deviation 1 over all response tokens of the global batch; safe-rlhf does not."""


class PidSettings(Group):
    """Gains of the multiplier as a controller of the cost (Stooke et al. 2020, algorithm 2)."""

    kp: float = Field(0.5, ge=0)
    """Proportional: answers the present error."""
    ki: float = Field(0.05, ge=0)
    """Integral: the part that stays when the cost has settled at its limit."""
    kd: float = Field(0.5, ge=0)
    """Derivative: brakes while the cost rises, which damps oscillation."""
    smoothing: float = Field(0.8, ge=0, lt=1)
    """Share of the old value in the moving averages behind the proportional and the derivative term."""


class PPOLagSettings(PPOSettings):
    """PPO under a cost limit, with a Lagrange multiplier (safe-rlhf's PPO-Lag)."""

    name: Literal["ppo_lag"] = "ppo_lag"  # type: ignore[assignment]
    """Which algorithm this is."""
    kl_coef: float = Field(0.01, ge=0)
    """As for PPO; it enters both streams in full, so safe-rlhf halves it to 0.01."""
    constrain: Literal["cost", "unsafe"] = "cost"
    """What is kept under the limit: the mean cost of a response (safe-rlhf), or the share of responses whose cost is
    above 0."""
    cost_limit: float = 0.0
    """For `cost` in units of the cost model's deviation, 0 being its boundary; for `unsafe` a share, such as 0.01."""
    multiplier: Literal["log", "pid"] = "log"
    """How lambda moves: gradient ascent on its logarithm (safe-rlhf), or a PID controller, which oscillates less."""
    lambda_init: float = Field(1.0, gt=0)
    """First value of the multiplier."""
    lambda_lr: float = Field(0.1, gt=0)
    """`log`: step of gradient ascent on log lambda, taken once per rollout."""
    pid: PidSettings = PidSettings()
    """`pid`: its gains."""
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
        if self.constrain == "unsafe" and not 0 < self.cost_limit < 1:
            raise ValueError(
                f"cost_limit is {self.cost_limit} and constrain is unsafe; accepted: a share above 0 and below 1."
            )
        return self


class RLOOSettings(PolicyGradientSettings):
    """REINFORCE with the other responses' mean as baseline, KL penalty inside the reward."""

    name: Literal["rloo"] = "rloo"
    """Which algorithm this is."""
    group_size: int = Field(4, ge=2)
    """Responses per prompt (async_rlhf, TRL: 2)."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Estimator inside the reward: k1 is unbiased, k3 never negative (Schulman 2020)."""
    whiten_advantages: bool = False
    """Advantages to mean 0 and deviation 1 over the global batch; off in async_rlhf and TRL."""


class GRPOSettings(TokenRatioSettings):
    """Advantages relative to the group, token by token, KL penalty inside the loss."""

    name: Literal["grpo"] = "grpo"
    """Which algorithm this is."""
    group_size: int = Field(8, ge=2)
    """Responses per prompt (TRL: 8)."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """Estimator inside the loss: k2 has the right gradient, k3 is the paper's (Shao et al. 2024)."""
    scale: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the group's deviation, the batch's, or nothing (Dr. GRPO)."""
    scale_eps: float = Field(1e-4, gt=0)
    """Added to the deviation (TRL: 1e-4; verl: 1e-6)."""


class PreferenceLossSettings(Group):
    """The loss on a pair of responses."""

    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference (safe-rlhf's script, async_rlhf, TRL: 0.1)."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """DPO's logistic loss, or IPO's square (Azar et al. 2023)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs taken to be labelled the wrong way round; for `sigmoid`."""

    @model_validator(mode="after")
    def _smooths_what_it_can(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing} and loss is ipo, which does without; set it to 0, or loss "
                "to sigmoid."
            )
        return self


class OnlineDPOSettings(OnlineSettings, PreferenceLossSettings):
    """DPO on the best and the worst of the responses just sampled."""

    name: Literal["online_dpo"] = "online_dpo"
    """Which algorithm this is."""
    group_size: int = Field(2, ge=2)
    """Responses per prompt; the best is chosen, the worst rejected (async_rlhf: 2)."""


class BestOfKSettings(OnlineSettings):
    """Supervised learning from the best of K responses just sampled."""

    name: Literal["best_of_k"] = "best_of_k"
    """Which algorithm this is."""
    group_size: int = Field(4, ge=2)
    """K, the responses per prompt (async_rlhf: 2)."""
    normalization: Normalization = "token"
    """As for PPO; `constant` with 1 sums over each response, as async_rlhf does."""
    normalization_constant: int | None = Field(None, ge=1)
    """For `constant`; absent takes generation.max_new_tokens."""


class DPOSettings(PreferenceLossSettings):
    """Direct preference optimisation on the pairs that people labelled; samples nothing, needs no reward model."""

    name: Literal["dpo"] = "dpo"
    """Which algorithm this is."""
    dimensions: tuple[Dimension, ...] = Field(("helpful",), min_length=1)
    """The preferences to learn from: helpful, harmless or both."""


AlgorithmSettings = Annotated[
    PPOSettings
    | PPOLagSettings
    | RLOOSettings
    | GRPOSettings
    | OnlineDPOSettings
    | BestOfKSettings
    | DPOSettings,
    Field(discriminator="name"),
]
