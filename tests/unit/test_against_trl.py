"""Our losses against TRL's on random tensors, values and gradients, and why some golden vectors differ.

TRL's own methods run (components/conformance/trl.py); where a difference is declared, it vanishes when the setting
behind it is matched.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from components.conformance import ours
from components.conformance.check import check_vectors
from components.conformance.vectors import read_vectors

pytest.importorskip("trl", reason="TRL is not installed; it comes with the dev extra")
from components.conformance import trl as theirs

LENGTHS = (1, 7, 3, 5, 2, 7, 4, 6)
WIDTH = 7
SEEDS = range(4)
LOSS_TYPES = [("token", "bnpo"), ("sequence", "grpo"), ("constant", "dr_grpo")]


def numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ragged(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.arange(WIDTH) < torch.tensor(lengths)[:, None]


def sampled(seed: int, spread: float = 0.3) -> dict[str, Tensor]:
    """Old log-probabilities, and new ones not far from them."""
    old = -numbers(len(LENGTHS), WIDTH, seed=seed).abs() - 0.1
    return {"logprobs": old + numbers(len(LENGTHS), WIDTH, seed=seed + 100, scale=spread), "old_logprobs": old}


def group_inputs(seed: int) -> dict[str, Any]:
    ref = -numbers(len(LENGTHS), WIDTH, seed=seed + 200).abs() - 0.1
    advantages = numbers(len(LENGTHS), seed=seed + 300)
    return {**sampled(seed), "ref_logprobs": ref, "advantages": advantages, "mask": ragged(), "clip": 0.2}


def pairs(seed: int) -> dict[str, Any]:
    names = ("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs")
    tokens = {name: -numbers(8, WIDTH, seed=seed + at).abs() for at, name in enumerate(names)}
    return {**tokens, "chosen_mask": ragged(), "rejected_mask": ragged(LENGTHS[::-1]), "label_smoothing": 0.0}


Loss = Callable[..., Tensor]


def assert_same(first: Loss, second: Loss, inputs: dict[str, Any], by: tuple[str, ...] = ("logprobs",)) -> None:
    """The same value, and the same gradient by every input named."""
    found = []
    for function in (first, second):
        leaves = [inputs[name].clone().requires_grad_() for name in by]
        loss = function(**{**inputs, **dict(zip(by, leaves, strict=True))})
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-7, atol=1e-9)
    assert all((slope != 0).any() for slope in found[0][1:])


# --- what agrees -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_dpo(seed: int) -> None:
    by = ("chosen_logprobs", "rejected_logprobs")
    assert_same(ours.preference_loss, theirs.preference_loss, {**pairs(seed), "beta": 0.1, "kind": "sigmoid"}, by)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_rloo_advantages(seed: int, kl_coef: float) -> None:
    inputs = {
        "scores": numbers(8, seed=seed), "logprobs": -numbers(8, WIDTH, seed=seed + 1).abs(), "mask": ragged(),
        "ref_logprobs": -numbers(8, WIDTH, seed=seed + 2).abs(), "group_size": 4, "kl_coef": kl_coef,
    }  # fmt: skip
    torch.testing.assert_close(ours.rloo_advantages(**inputs), theirs.rloo_advantages(**inputs))


@pytest.mark.parametrize("seed", SEEDS)
def test_rloo_loss(seed: int) -> None:
    inputs = {**sampled(seed, 0.1), "advantages": numbers(8, seed=seed), "mask": ragged(), "clip": 0.2}
    assert_same(ours.sequence_policy_loss, theirs.sequence_policy_loss, inputs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_advantages(seed: int, scale: Any) -> None:
    rewards = numbers(12, seed=seed).round(decimals=1)
    rewards[4:8] = 0.3  # a group that says nothing
    inputs = {"rewards": rewards, "group_size": 4, "scale": scale, "eps": 1e-4}
    torch.testing.assert_close(ours.group_advantages(**inputs), theirs.group_advantages(**inputs), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("normalization", [ours_name for ours_name, _ in LOSS_TYPES])
def test_grpo_loss(normalization: str, kl_coef: float, seed: int) -> None:
    constant = 16 if normalization == "constant" else None
    inputs = {**group_inputs(seed), "kl_coef": kl_coef, "normalization": normalization, "constant": constant}
    assert_same(ours.grpo_loss, theirs.grpo_loss, inputs)


def test_the_three_normalisations_are_three_losses_of_trl() -> None:
    assert list(theirs.LOSS_TYPES.items()) == LOSS_TYPES


@pytest.mark.parametrize("seed", SEEDS)
def test_dapo_is_the_token_normalisation_over_the_global_count(seed: int) -> None:
    inputs = {**group_inputs(seed), "kl_coef": 0.04, "normalization": "token", "constant": None}
    trainer = theirs.grpo_trainer(0.2, None, None, 0.04, "dapo", None)
    count = inputs["mask"].sum()

    def micro_batches(logprobs: Tensor, **_: Any) -> Tensor:
        return sum(
            theirs.grpo_trainer_loss(
                trainer, logprobs[rows], inputs["mask"][rows], advantages=inputs["advantages"][rows],
                old_per_token_logps=inputs["old_logprobs"][rows], ref_per_token_logps=inputs["ref_logprobs"][rows],
                num_items_in_batch=count,
            )
            for rows in (slice(0, 3), slice(3, 8))
        )  # type: ignore[return-value]  # fmt: skip

    assert_same(ours.grpo_loss, micro_batches, inputs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("clip_high", "dual_clip"), [(None, None), (0.28, None), (None, 3.0), (0.28, 1.5)])
def test_ppo_loss(clip_high: float | None, dual_clip: float | None, seed: int) -> None:
    inputs = {
        **sampled(seed, 1.0), "advantages": numbers(8, WIDTH, seed=seed), "mask": ragged(), "clip": 0.2,
        "clip_high": clip_high, "dual_clip": dual_clip, "normalization": "token", "constant": None,
    }  # fmt: skip
    assert_same(ours.policy_loss, theirs.policy_loss, inputs)


@pytest.mark.parametrize("seed", SEEDS)
def test_reward_loss(seed: int) -> None:
    scores = {"chosen": numbers(6, seed=seed, scale=3), "rejected": numbers(6, seed=seed + 1, scale=3)}
    assert_same(ours.ranking_loss, theirs.ranking_loss, scores, ("chosen", "rejected"))


def test_trls_head_gives_the_log_probabilities_of_tokens_and_0_where_there_is_no_label() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, **shape)).eval()
    ids = torch.randint(0, 11, (3, 6))
    expected = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    labels = ids.masked_fill(torch.arange(6) >= torch.tensor([[6], [4], [3]]), -100)
    add_fused_lm_head(model)
    found = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, expected.masked_fill(labels[:, 1:] == -100, 0.0), rtol=1e-4, atol=1e-5)


# --- what differs, and why -------------------------------------------------------------------------------------------


def test_trl_passes_every_vector_but_those_that_are_declared_to_differ() -> None:
    outcomes = check_vectors(theirs, read_vectors(), torch.float64)
    found = {status: {o.vector.name for o in outcomes if o.status == status} for status in ("pass", "FAIL", "differs")}
    assert found["FAIL"] == set()
    assert found["differs"] == set(theirs.DIFFERENCES)
    assert len(found["pass"]) == 29


@pytest.mark.parametrize("seed", SEEDS)
def test_ipo_agrees_once_log_ratios_are_averaged_over_tokens(seed: int) -> None:
    inputs = {**pairs(seed), "beta": 0.1, "kind": "ipo"}
    mean = dict(inputs)
    for side in ("chosen", "rejected"):
        lengths = inputs[f"{side}_mask"].sum(1, keepdim=True)
        mean |= {name: inputs[name] / lengths for name in (f"{side}_logprobs", f"ref_{side}_logprobs")}
    assert not torch.isclose(ours.preference_loss(**inputs), theirs.preference_loss(**inputs))
    torch.testing.assert_close(ours.preference_loss(**mean), theirs.preference_loss(**inputs))
    single = ragged((1,) * 8)
    inputs |= {"chosen_mask": single, "rejected_mask": single}
    assert_same(ours.preference_loss, theirs.preference_loss, inputs, ("chosen_logprobs", "rejected_logprobs"))


@pytest.mark.parametrize(("log_ratio", "agree"), [(19.9, True), (20.1, False)])
def test_without_the_clamp_at_20_the_policy_losses_agree(log_ratio: float, agree: bool) -> None:
    one, mask = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    moved = {"logprobs": -one, "old_logprobs": -(1 + log_ratio) * one, "mask": mask, "clip": 0.2}
    token = {**moved, "clip_high": None, "dual_clip": None, "normalization": "token", "constant": None}
    row = {**moved, "advantages": -one[0]}
    still = {**row, "old_logprobs": -one, "normalization": "token", "constant": None}
    losses = {
        "policy_loss": {**token, "advantages": -one},
        "sequence_policy_loss": row,
        "grpo_loss": {**still, "ref_logprobs": (log_ratio - 1) * one, "kl_coef": 1.0},
    }
    for name, inputs in losses.items():
        pair = [getattr(library, name)(**inputs) for library in (ours, theirs)]
        assert torch.isclose(*pair) == agree, name


def test_with_finite_padding_the_policy_loss_agrees() -> None:
    inputs = {
        **sampled(0), "advantages": numbers(8, WIDTH, seed=1), "mask": ragged(), "clip": 0.2,
        "clip_high": None, "dual_clip": None, "normalization": "token", "constant": None,
    }  # fmt: skip
    padded = {value: inputs["advantages"].masked_fill(~ragged(), value) for value in (1e6, float("nan"))}
    for value, advantages in padded.items():
        mine, other = (library.policy_loss(**{**inputs, "advantages": advantages}) for library in (ours, theirs))
        assert torch.isclose(mine, other) == (value == 1e6)
        assert torch.isfinite(mine)


def test_another_epsilon_and_smoothed_labels_are_not_offered() -> None:
    with pytest.raises(NotImplementedError, match="1e-4"):
        theirs.group_advantages(rewards=numbers(4, seed=0), group_size=2, scale="group", eps=1e-6)
    with pytest.raises(NotImplementedError, match="robust"):
        theirs.preference_loss(**{**pairs(0), "beta": 0.1, "kind": "sigmoid", "label_smoothing": 0.1})
