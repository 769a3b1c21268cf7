"""TRL's own losses and advantages under the golden vectors' names.

Nothing of TRL is typed again here: its trainers' methods run unbound, with a stand-in for the trainer that has the
settings they read, and a model that gives back the vector's log-probabilities, 0 where no label is, as TRL's fused
head does. Shapes as in `ours.py`.
"""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOTrainer, GRPOTrainer, RewardTrainer, RLOOTrainer

_CLAMP = "TRL does not clamp log-ratios; within +-20 it agrees"
_PADDING = "TRL multiplies by the mask, and 0 * nan is nan; with finite padding it agrees"

DIFFERENCES = {
    "policy_loss/clamped": _CLAMP,
    "sequence_policy_loss/clamped": _CLAMP,
    "grpo_loss/clamped": _CLAMP,
    "policy_loss/not-finite-padding": _PADDING,
    "preference_loss/ipo": "TRL averages IPO's log-ratios over tokens; for responses of one token it agrees",
}

LOSS_TYPES = {"token": "bnpo", "sequence": "grpo", "constant": "dr_grpo"}
GROUP_EPSILON = 1e-4


def group_advantages(*, rewards: Tensor, group_size: int, scale: str, eps: float) -> Tensor:
    """GRPO's advantages (B,), out of the method that generates and scores."""
    if eps != GROUP_EPSILON:
        raise NotImplementedError("TRL adds 1e-4 to the deviation")
    still = torch.zeros(len(rewards), 1, dtype=rewards.dtype)
    trainer = _sampler(rewards, group_size, still, still > 0, 0.0)
    trainer.scale_rewards = scale
    tokens, texts = [[0]] * len(rewards), [""] * len(rewards)
    trainer._generate = lambda prompts: (tokens, tokens, None, texts, None, {}, None, None)
    return _advantages(GRPOTrainer, trainer, len(rewards))


def leave_one_out(*, rewards: Tensor, group_size: int) -> Tensor:
    """RLOO's advantages (B,) without a KL penalty."""
    still = torch.zeros(len(rewards), 1, dtype=rewards.dtype)
    return rloo_advantages(
        scores=rewards, logprobs=still, ref_logprobs=still, mask=still == 0, group_size=group_size, kl_coef=0.0
    )


def rloo_advantages(
    *, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, group_size: int, kl_coef: float
) -> Tensor:
    """RLOO's advantages (B,), out of the method that generates and scores."""
    trainer = _sampler(scores, group_size, logprobs, mask, kl_coef)
    trainer.ref_model = FusedHead(ref_logprobs)
    completions = [[1] * int(length) for length in mask.sum(1)]
    trainer._generate = lambda prompts: ([[0]] * len(scores), completions, [""] * len(scores))
    return _advantages(RLOOTrainer, trainer, len(scores))


def policy_loss(
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    clip_high: float | None,
    dual_clip: float | None,
    normalization: str,
    constant: int | None,
) -> Tensor:
    """GRPO's loss without KL on advantages per token; `delta` is its name for the dual clip."""
    trainer = grpo_trainer(clip, clip_high, dual_clip, 0.0, LOSS_TYPES[normalization], constant)
    return grpo_trainer_loss(trainer, logprobs, mask, old_per_token_logps=old_logprobs, advantages=advantages)


def grpo_loss(
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    kl_coef: float,
    normalization: str,
    constant: int | None,
) -> Tensor:
    """GRPO's loss; `bnpo`, `grpo` and `dr_grpo` are its names for the three normalisations."""
    trainer = grpo_trainer(clip, None, None, kl_coef, LOSS_TYPES[normalization], constant)
    sampled = {"old_per_token_logps": old_logprobs, "ref_per_token_logps": ref_logprobs}
    return grpo_trainer_loss(trainer, logprobs, mask, advantages=advantages, **sampled)


def sequence_policy_loss(
    *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """RLOO's loss."""
    trainer = _trainer(epsilon_low=clip, epsilon_high=clip)
    _bind(trainer, RLOOTrainer)
    old = old_logprobs.masked_fill(~mask, 0.0).sum(1)
    inputs = _inputs(mask) | {"old_logps": old, "advantages": advantages}
    loss: Tensor = RLOOTrainer._compute_loss(trainer, FusedHead(logprobs), inputs)
    return loss


def preference_loss(
    *,
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    beta: float,
    kind: str,
    label_smoothing: float,
) -> Tensor:
    """DPO's loss; its batch is all chosen rows, then all rejected ones."""
    if label_smoothing:
        raise NotImplementedError("TRL has no smoothed sigmoid; its `robust` is another loss")
    mask = torch.cat([chosen_mask, rejected_mask])
    trainer = _trainer(
        beta=beta, loss_types=[kind], loss_weights=[1.0], label_smoothing=0.0, f_divergence_type="reverse_kl",
        ld_alpha=None, use_weighting=False, precompute_ref_logps=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        ref_model=FusedHead(torch.cat([ref_chosen_logprobs, ref_rejected_logprobs])),
    )  # fmt: skip
    inputs = _inputs(mask)
    ids, shown = (torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], 1) for part in ("ids", "mask"))
    responses = torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], 1)
    batch = {"input_ids": ids, "attention_mask": shown, "completion_mask": responses}
    policy = FusedHead(torch.cat([chosen_logprobs, rejected_logprobs]))
    loss: Tensor = DPOTrainer._compute_loss(trainer, policy, batch, return_outputs=False)
    return loss


def ranking_loss(*, chosen: Tensor, rejected: Tensor) -> Tensor:
    """The reward trainer's loss."""
    scores = torch.cat([chosen, rejected])[:, None]
    trainer = _trainer(args=SimpleNamespace(center_rewards_coefficient=None))
    loss: Tensor = RewardTrainer.compute_loss(trainer, lambda **inputs: SimpleNamespace(logits=scores), {})
    return loss


def _trainer(**settings: Any) -> Any:
    """What a trainer's methods read of it, in evaluation: one process, nothing accumulated, no mixture of experts."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, process_index=0, is_main_process=True,
        gather=_same, gather_for_metrics=_same, reduce=lambda tensor, reduction: tensor, autocast=nullcontext,
    )  # fmt: skip
    return SimpleNamespace(
        accelerator=accelerator, model=FusedHead(torch.zeros(0)), aux_loss_enabled=False,
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0, **settings,
    )  # fmt: skip


def _sampler(scores: Tensor, group_size: int, logprobs: Tensor, mask: Tensor, kl_coef: float) -> Any:
    """A trainer whose sampling is over: completions have these scores and log-probabilities."""
    args = SimpleNamespace(
        per_device_eval_batch_size=len(scores), steps_per_generation=1, gradient_accumulation_steps=1,
        gradient_checkpointing_kwargs=None,
    )  # fmt: skip
    trainer = _trainer(
        args=args, beta=kl_coef, num_generations_eval=group_size, num_iterations=1, ref_model=None,
        _tokenizer=SimpleNamespace(pad_token_id=0), pad_to_multiple_of=None, mask_truncated_completions=False,
        multi_objective_aggregation="sum_then_normalize", normalize_advantages=False, reward_clip_range=None,
        reward_func_names=["score"], reward_weights=torch.ones(1), use_vllm=False, tools=None, environments=None,
        environment_factories=None, _calculate_rewards=lambda *ignored: scores[:, None],
        _pending_extra_logs={}, _pending_metrics={},
        _logs={"prompt": [], "completion": [], "rewards": defaultdict(list), "advantages": [], "extra": {}},
    )  # fmt: skip
    trainer.model = FusedHead(logprobs)
    _bind(trainer, RLOOTrainer)
    return trainer


def grpo_trainer(
    clip: float, clip_high: float | None, delta: float | None, kl_coef: float, loss_type: str, constant: int | None
) -> Any:
    """A stand-in for GRPOTrainer with these settings."""
    trainer = _trainer(
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False), beta=kl_coef, loss_type=loss_type,
        epsilon_low=clip, epsilon_high=clip if clip_high is None else clip_high, max_completion_length=constant,
        importance_sampling_level="token", off_policy_mask_threshold=None, top_entropy_quantile=1.0,
        use_vllm=False, _entropy_bonus_enabled=False,
    )  # fmt: skip
    _bind(trainer, GRPOTrainer)
    return trainer


def grpo_trainer_loss(trainer: Any, logprobs: Tensor, mask: Tensor, **sampled: Tensor) -> Tensor:
    """The loss on log-probabilities that, like the policy's own, are 0 where there is no token."""
    scored = {name: value.masked_fill(~mask, 0.0) if "logps" in name else value for name, value in sampled.items()}
    loss: Tensor = GRPOTrainer._compute_loss(trainer, FusedHead(logprobs), _inputs(mask) | scored)
    return loss


def _advantages(kind: Any, trainer: Any, rows: int) -> Tensor:
    """What the method that generates and scores makes of the stand-in's samples."""
    advantages: Tensor = kind._generate_and_score_completions(trainer, [{"prompt": ""}] * rows)["advantages"]
    return advantages


def _bind(trainer: Any, kind: Any) -> None:
    """Give the stand-in the method that reads log-probabilities from the model."""
    trainer._get_per_token_logps_and_entropies = kind._get_per_token_logps_and_entropies.__get__(trainer)


def _inputs(mask: Tensor) -> dict[str, Tensor]:
    """Prompts of one token, and responses under the mask."""
    one = torch.ones(len(mask), 1, dtype=torch.long)
    return {"prompt_ids": one, "prompt_mask": one, "completion_ids": mask.long(), "completion_mask": mask.long()}


class FusedHead(nn.Module):
    """A policy with TRL's fused head: log-probabilities (B, R) of the tokens that have a label, 0 elsewhere."""

    is_gradient_checkpointing = False

    def __init__(self, logprobs: Tensor) -> None:
        super().__init__()
        self.logprobs = logprobs
        self.eval()

    def forward(self, *, labels: Tensor, **inputs: Any) -> SimpleNamespace:
        """What TRL's methods read of a model's outputs."""
        scored = self.logprobs.masked_fill(labels[:, 1:] == -100, 0.0)
        still = torch.zeros_like(scored)
        return SimpleNamespace(log_probs=scored, entropy=still, mean_logits=still, is_top1=still.bool())


def _same(tensor: Tensor) -> Tensor:
    return tensor
