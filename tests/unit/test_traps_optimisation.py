"""Traps between the loss and the weights: what a token weighs, Adam, clips by name, mixed-in losses, adapters."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from components.artifacts import DataDir
from components.launch import STEPS, settings_class
from components.logprobs import response_logprobs
from components.models import load_policy, with_lora
from components.rl.algorithm_settings import BestOfKSettings, GRPOSettings, PPOLagSettings, PPOSettings, RLOOSettings
from components.rl.algorithms import build
from components.rl.functional import clipped_policy_loss
from components.rl.loop import num_updates
from components.rl.networks import Networks
from components.rl.ptx import Ptx
from components.rl.reference import AdapterOff, FrozenReference
from components.rl.settings import PtxSettings, RLSettings
from components.rl.types import Batch, Forward, micro_rows
from components.settings import Compute, Lora, Optimizer
from components.tokens import encode_prompt, encode_response, load_tokenizer
from components.updates import Updater

FP32 = Compute(dtype="fp32")
PLAIN = Optimizer(lr=0.1, schedule="constant", warmup=0.0)
IDS = torch.arange(10, 22).view(2, 6)
MASK = torch.ones(2, 6, dtype=torch.bool)


def batch_of(rows: int, width: int, seed: int = 0) -> Batch:
    """Responses of one to `width` tokens with random numbers of every kind."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.arange(width) < torch.tensor([1 + 3 * row % width for row in range(rows)])[:, None]
    ids = torch.zeros(rows, width + 1, dtype=torch.long)
    return Batch(
        ids,
        torch.ones_like(ids, dtype=torch.bool),
        mask,
        logprobs=-numbers(rows, width).abs(),
        ref_logprobs=-numbers(rows, width).abs(),
        advantages=numbers(rows, width),
        returns=numbers(rows, width),
        values=numbers(rows, width),
        cost_returns=numbers(rows, width),
        cost_values=numbers(rows, width),
    )


def gradient(algorithm: Any, batch: Batch, size: int, mean_of_means: bool = False) -> Tensor:
    """The gradient (B, R) of the update on the old log-probabilities, computed `size` rows at a time.

    Each part is divided by the terms of the whole batch, or wrongly by its own.
    """
    assert batch.logprobs is not None
    logprobs = batch.logprobs.clone().requires_grad_()
    parts = micro_rows(batch.attention_mask, size, batch.unit)
    for rows in parts:
        part, own = batch.rows(rows), logprobs[rows]
        total, _ = algorithm.loss(part, Forward(own, torch.zeros_like(own), part.values, part.cost_values))
        (total / (algorithm.terms(part) * len(parts) if mean_of_means else algorithm.terms(batch))).backward()
    assert logprobs.grad is not None
    return logprobs.grad


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
@pytest.mark.parametrize(
    "settings", [PPOSettings(), PPOLagSettings(), GRPOSettings(), BestOfKSettings()], ids=lambda s: s.name
)
def test_a_token_weighs_the_same_in_whatever_micro_batch_it_falls(settings: Any, normalization: Any) -> None:
    algorithm: Any = build(settings.model_copy(update={"normalization": normalization}), lambda tensor: tensor, 7)
    batch = batch_of(6, 7)
    whole = gradient(algorithm, batch, 6)
    for size in (1, 4):
        torch.testing.assert_close(gradient(algorithm, batch, size), whole)
        harmless = size == 1 and normalization != "token"  # as many terms in every micro-batch
        assert torch.allclose(gradient(algorithm, batch, size, mean_of_means=True), whole) == harmless


def test_a_whole_response_weighs_the_same_in_whatever_micro_batch_it_falls() -> None:
    algorithm: Any = build(RLOOSettings(), lambda tensor: tensor, 7)
    batch = replace(batch_of(6, 7), advantages=torch.randn(6, generator=torch.Generator().manual_seed(1)))
    whole = gradient(algorithm, batch, 6)
    torch.testing.assert_close(gradient(algorithm, batch, 4), whole)
    assert not torch.allclose(gradient(algorithm, batch, 4, mean_of_means=True), whole)


def test_adam_is_the_paper_s_and_not_tensorflow_s_and_its_epsilon_is_small() -> None:
    weight = nn.Linear(1, 1, bias=False)
    before = weight.weight.item()
    updater = Updater(weight, PLAIN, FP32, total_updates=1)
    tiny = 1e-8
    updater.backward(weight.weight.sum() * tiny, terms=1)
    updater.step()
    moved = before - weight.weight.item()
    assert Optimizer().eps == 1e-8
    # Bias-corrected moments g and g^2: lr g / (g + eps)
    assert moved == pytest.approx(0.1 * tiny / (tiny + 1e-8), rel=1e-3)
    # TensorFlow adds eps before the correction of the second moment, and eps 1e-5 would hardly move at all.
    correction = math.sqrt(1 - Optimizer().betas[1])
    assert abs(moved - 0.1 * correction * tiny / (correction * tiny + 1e-8)) > 0.02
    assert abs(moved - 0.1 * tiny / (tiny + 1e-5)) > 0.04


def test_the_schedule_counts_updates_and_not_responses() -> None:
    settings = RLSettings(
        algorithm=RLOOSettings(group_size=4), prompts_per_rollout=8, minibatch_size=12, epochs=2
    )
    # 32 responses in minibatches of 12 are 3 updates, twice over each rollout
    assert num_updates(settings, 5, rows_per_batch=32) == 5 * 2 * 3
    weight = nn.Linear(1, 1)
    updater = Updater(weight, Optimizer(lr=1.0, schedule="linear", warmup=0.0, min_lr=0.0), FP32, total_updates=4)
    rates = []
    for size in (1, 1000, 1, 1000):
        updater.count(samples=size, tokens=10 * size)
        updater.backward(weight.weight.sum(), terms=1)
        rates.append(updater.step()["loss/lr"])
    assert rates == pytest.approx([1.0, 0.75, 0.5, 0.25])


def optimizers(settings: BaseModel) -> Iterator[Optimizer]:
    """Every optimiser in the settings of a step."""
    for value in vars(settings).values():
        if isinstance(value, Optimizer):
            yield value
        elif isinstance(value, BaseModel):
            yield from optimizers(value)


def test_every_optimiser_of_every_step_clips_at_one() -> None:
    found = {step: list(optimizers(settings_class(step)())) for step in STEPS}
    assert {step: len(own) for step, own in found.items() if own} == {"base": 1, "sft": 1, "reward": 1, "rl": 2}
    assert {own.max_grad_norm for each in found.values() for own in each} == {1.0}


def test_clip_higher_and_dual_clip_are_off_unless_named() -> None:
    for settings in (PPOSettings(), GRPOSettings(), PPOLagSettings()):
        assert settings.clip_high is None and settings.dual_clip is None and settings.clip == 0.2
    old, one = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)

    def loss(ratio: float, advantage: float, **clips: float) -> float:
        new = torch.tensor([[math.log(ratio)]])
        return clipped_policy_loss(new, old, torch.tensor([[advantage]]), one, 0.2, **clips).total.item()

    # PPO of 2017: min(1.5, 1.2) and min(5 * -1, 1.2 * -1)
    assert loss(1.5, 1.0) == pytest.approx(-1.2)
    assert loss(5.0, -1.0) == pytest.approx(5.0)
    # clip-higher raises the upper bound alone; dual clip bounds what a negative advantage can do
    assert loss(1.5, 1.0, clip_high=0.28) == pytest.approx(-1.28)
    assert loss(0.5, -1.0, clip_high=0.28) == loss(0.5, -1.0) == pytest.approx(0.8)
    assert loss(5.0, -1.0, dual_clip=3.0) == pytest.approx(3.0)
    assert loss(5.0, 1.0, dual_clip=3.0) == loss(5.0, 1.0) == pytest.approx(-1.2)


def test_ptx_joins_the_update_and_makes_none_of_its_own(policy_folder: Path, data_folder: Path) -> None:
    tokenizer = load_tokenizer(policy_folder)
    demonstrations = DataDir(data_folder).demonstrations("train")[:3]
    networks = Networks(load_policy(policy_folder), temperature=0.5)
    updater = Updater(networks, Optimizer(max_grad_norm=1e9), FP32, total_updates=2)
    taken: list[Tensor] = []
    updater.optimizer.step = lambda: taken.append(flat_gradient(networks))  # type: ignore[method-assign]
    ptx = Ptx(PtxSettings(coef=16.0, batch_size=3), demonstrations, tokenizer, 64, 32, seed=0)
    forward = networks(IDS, MASK, 3)
    updater.backward(-forward.logprobs.sum(), terms=6)
    metrics = ptx.backward(updater)
    updater.step()
    assert updater.update == len(taken) == 1  # one step for both, where safe-rlhf takes two
    expected = load_policy(policy_folder)
    policy_loss = -response_logprobs(expected, IDS, MASK, 3, 0.5)[0].sum() / 6
    summed, tokens = torch.zeros(()), 0
    for row in demonstrations:
        prompt, response = encode_prompt(tokenizer, row.prompt), encode_response(tokenizer, row.response)
        ids = torch.tensor([prompt + response])
        whole = torch.ones_like(ids, dtype=torch.bool)
        summed = summed - response_logprobs(expected, ids, whole, len(response))[0].sum()  # at temperature 1
        tokens += len(response)
    (policy_loss + 16 * summed / tokens).backward()
    assert metrics["loss/ptx"] == pytest.approx(float(summed.detach()) / tokens, rel=1e-4)
    torch.testing.assert_close(taken[0], flat_gradient(expected), atol=1e-3, rtol=1e-3)


def flat_gradient(model: nn.Module) -> Tensor:
    """All gradients in one row, in order of the parameters."""
    return torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def adapted(policy_folder: Path) -> Any:
    """A policy whose adapters have learned something."""
    model = with_lora(load_policy(policy_folder), Lora(rank=4))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def read(reference: Any) -> Tensor:
    logprobs: Tensor = reference.logprobs(IDS, MASK, 3, 1.0, [torch.arange(len(IDS))])
    return logprobs


def test_reading_the_reference_leaves_the_adapters_as_they_were(adapted: Any, policy_folder: Path) -> None:
    adapted.train()
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    with torch.no_grad():
        before = adapted(IDS).logits
    seen = read(AdapterOff(adapted, "fp32"))
    with torch.no_grad():
        assert torch.equal(adapted(IDS).logits, before)
    assert [name for name, parameter in adapted.named_parameters() if parameter.requires_grad] == trainable
    assert not seen.requires_grad and adapted.training
    torch.testing.assert_close(seen, read(FrozenReference(load_policy(policy_folder), "fp32")))
    with_adapters = read(FrozenReference(adapted, "fp32"))
    assert (with_adapters - seen).abs().max() > 0.1  # the KL to it would always be 0


def test_adapters_are_on_again_after_a_reading_that_failed(adapted: Any) -> None:
    before = read(FrozenReference(adapted, "fp32"))
    with pytest.raises(IndexError):
        AdapterOff(adapted, "fp32").logprobs(IDS + 10_000, MASK, 3, 1.0, [torch.arange(len(IDS))])
    torch.testing.assert_close(read(FrozenReference(adapted, "fp32")), before)


def test_a_policy_says_the_same_when_its_adapters_are_merged(adapted: Any) -> None:
    before = read(FrozenReference(adapted.eval(), "fp32"))
    without = read(AdapterOff(adapted, "fp32"))
    after = read(FrozenReference(adapted.merge_and_unload().eval(), "fp32"))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert (after - without).abs().max() > 0.1
