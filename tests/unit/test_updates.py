"""Updates of the weights: schedule, clipping, what is not finite, counts, and what a checkpoint brings back."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from components.errors import InputError, TrainingFailure
from components.models import load_policy
from components.optimizers import learning_rate_factor
from components.settings import Compute, Optimizer
from components.updates import Updater

FP32 = Compute(dtype="fp32")
PLAIN = Optimizer(lr=0.1, schedule="constant", warmup=0.0, max_grad_norm=1e9)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 10 updates, warm-up 2: then done = 0, 1/8 ... 7/8 and factor 0.1 + 0.9 shape
        ("linear", [0.5, 1.0, 1.0, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125]),
        ("cosine", [0.5, 1.0, *(0.1 + 0.9 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8))]),
        ("constant", [0.5, 1.0] + [1.0] * 8),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule: Any, expected: list[float]) -> None:
    settings = Optimizer(schedule=schedule, warmup=0.2, min_lr=0.1)
    assert [learning_rate_factor(update, 10, settings) for update in range(10)] == pytest.approx(expected)


def test_without_warm_up_the_first_rate_is_the_peak() -> None:
    assert learning_rate_factor(0, 1, Optimizer(warmup=0.0)) == 1.0


def gradient_step(updater: Updater, gradient: float) -> dict[str, float]:
    """One step on a loss that is the weights' sum times `gradient`."""
    updater.backward(sum(p.sum() for p in updater.model.parameters()) * gradient, terms=1)
    return updater.step()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(bad: float) -> None:
    model = network()
    updater = Updater(model, PLAIN, FP32, total_updates=3)
    before = [parameter.clone() for parameter in model.parameters()]
    metrics = gradient_step(updater, bad)
    assert metrics["loss/skipped_updates"] == 1 and not math.isfinite(metrics["loss/grad_norm"])
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    metrics = gradient_step(updater, 1.0)
    assert metrics["loss/skipped_updates"] == 1 and math.isfinite(metrics["loss/grad_norm"])
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_gradients_are_scaled_down_to_the_norm_and_never_up() -> None:
    seen = []
    for size in (1.0, 100.0, 0.01):
        model = network()
        updater = Updater(model, Optimizer(max_grad_norm=0.5), FP32, total_updates=1)
        scales: list[float] = []
        updater.optimizer.step = lambda m=model, s=scales: s.append(  # type: ignore[method-assign]
            torch.cat([p.grad.flatten() for p in m.parameters()]).norm().item()
        )
        norm = gradient_step(updater, size)["loss/grad_norm"]
        assert norm == pytest.approx(size * math.sqrt(41), rel=1e-4)  # 3 * 8 + 8 + 8 + 1 weights
        seen += scales
    assert seen == pytest.approx([0.5, 0.5, 0.01 * math.sqrt(41)], rel=1e-3)


def networks() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(2, 2) for name in ("policy", "value", "value_head")})


def test_each_network_is_clipped_by_itself_and_has_its_own_schedule() -> None:
    model = networks()
    own = Optimizer(lr=0.2, schedule="linear", warmup=0.0, min_lr=0.0, max_grad_norm=0.5)
    updater = Updater(model, PLAIN, FP32, 4, {"value": own, "absent": own})
    scales: dict[str, float] = {}

    def keep() -> None:
        for name, part in model.items():
            scales[name] = torch.cat([p.grad.flatten() for p in part.parameters() if p.grad is not None]).norm().item()

    updater.optimizer.step = keep  # type: ignore[method-assign]
    metrics = [gradient_step(updater, 10.0) for _ in range(2)][-1]
    # 6 weights a network, each with gradient 10; the policy and the head are PLAIN's, 12 weights together
    assert metrics["loss/grad_norm"] == pytest.approx(10 * math.sqrt(12))
    assert metrics["loss/grad_norm_value"] == pytest.approx(10 * math.sqrt(6))
    assert scales == pytest.approx({"policy": 10 * math.sqrt(6), "value": 0.5, "value_head": 10 * math.sqrt(6)})
    assert (metrics["loss/lr"], metrics["loss/lr_value"]) == pytest.approx((0.1, 0.15))  # 3 of 4 updates to come
    assert not any("absent" in name for name in metrics)


def test_a_network_has_its_own_moments_and_rate() -> None:
    """The first step of AdamW by hand: with gradient g a weight moves by its rate times g / (g + eps)."""
    model = networks()
    before = {name: part.weight.detach().clone() for name, part in model.items()}
    own = Optimizer(lr=0.5, schedule="constant", warmup=0.0, eps=2.0, max_grad_norm=1e9)
    gradient_step(Updater(model, PLAIN, FP32, 1, {"value": own}), 2.0)
    moved = {name: (before[name] - part.weight).mean().item() for name, part in model.items()}
    assert moved == pytest.approx({"policy": 0.1, "value": 0.5 * 2 / (2 + 2), "value_head": 0.1})


def test_one_bad_gradient_stops_every_network() -> None:
    model = networks()
    before = [parameter.clone() for parameter in model.parameters()]
    updater = Updater(model, PLAIN, FP32, 1, {"value": PLAIN})
    updater.backward(model["policy"].weight.sum() + model["value"].weight.sum() * math.inf, terms=1)
    metrics = updater.step()
    assert math.isfinite(metrics["loss/grad_norm"]) and not math.isfinite(metrics["loss/grad_norm_value"])
    assert metrics["loss/skipped_updates"] == 1
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is_finite() -> None:
    model = network()
    before = [parameter.clone() for parameter in model.parameters()]
    updater = Updater(model, PLAIN, FP32, total_updates=2)
    weights = sum(p.sum() for p in model.parameters())
    updater.backward(weights + math.inf, terms=1)  # one micro-batch of two
    updater.backward(weights * 1.0, terms=1)
    metrics = updater.step()
    assert math.isfinite(metrics["loss/grad_norm"]) and metrics["loss/skipped_updates"] == 1
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert gradient_step(updater, 1.0)["loss/grad_norm"] == pytest.approx(math.sqrt(41))  # nothing is left of it


def test_too_many_skipped_in_a_row_fail_with_what_is_known() -> None:
    model = networks()
    settings = PLAIN.model_copy(update={"max_skipped": 2})
    updater = Updater(model, settings, FP32, 9, {"value": Optimizer(lr=0.25, schedule="constant", warmup=0.0)})
    for gradient in (math.nan, math.nan, 1.0, math.nan, math.nan):  # the good one in between breaks the row
        gradient_step(updater, gradient)
    updater.backward(model["policy"].weight.sum() * math.nan + model["value"].bias.sum(), terms=1)
    with pytest.raises(TrainingFailure) as failure:
        updater.step()
    assert str(failure.value) == (
        "update 6 of 9 was skipped for a loss or gradient that is not finite, number 3 in a row; max_skipped allows 2. "
        "Last: loss nan, gradient norm nan, gradient norm of value 1.414, learning rate 0.1, learning rate of value "
        "0.25, dtype fp32; the gradient is not finite in policy.weight. Lower the learning rate or lengthen the "
        "warm-up, compute in fp32, or look for broken rows in the data. Checkpoints written before stay."
    )


def test_with_no_update_to_skip_the_first_bad_one_fails_and_names_the_first_parameters() -> None:
    updater = Updater(network(), PLAIN.model_copy(update={"max_skipped": 0}), FP32, 1)
    with pytest.raises(TrainingFailure, match=r"not finite in 0\.weight, 0\.bias, 2\.weight and 1 more parameters\. "):
        gradient_step(updater, math.nan)


def test_samples_and_tokens_are_counted_over_all_updates() -> None:
    updater = Updater(network(), PLAIN, FP32, total_updates=2)
    seen = []
    for samples, tokens in ((3, 50), (4, 70)):
        updater.count(samples=samples, tokens=tokens)
        metrics = gradient_step(updater, 1.0)
        seen.append((metrics["data/samples"], metrics["data/tokens"]))
    assert seen == [(3, 50), (7, 120)]


class Buffered(nn.Module):
    """A trained layer, a frozen one, a buffer that belongs to the state and one that does not."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.layer, self.frozen = nn.Linear(size, 2), nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def learned(updates: int) -> Updater:
    """An updater some updates on, one of them skipped."""
    torch.manual_seed(updates)
    updater = Updater(Buffered(), Optimizer(lr=0.01, schedule="linear", warmup=0.0), FP32, 10)
    for number in range(updates):
        updater.count(1, 10)
        module = updater.module
        module.kept += 1
        updater.backward(module.layer.weight.square().sum() * (math.nan if number == updates - 1 else 1.0), terms=1)
        updater.step()
    return updater


def test_a_checkpoint_brings_everything_back() -> None:
    first, second = learned(4), learned(2)
    state, values = first.state(), first.values()
    assert values == {"update": 4, "skipped": 1, "skipped_in_row": 1, "samples": 4, "tokens": 40}
    model = {name for name in state if name.startswith("model.")}
    assert model == {"model.layer.weight", "model.layer.bias", "model.kept"}  # frozen weights are the folder's
    assert "optimizer.layer.weight.exp_avg_sq" in state
    state = {name: tensor.clone() for name, tensor in state.items()}  # as if read from disk
    draws = [(torch.rand(3).tolist(), random.random(), np.random.rand()) for _ in range(2)]
    second.restore(state, values)
    assert draws == [(torch.rand(3).tolist(), random.random(), np.random.rand()) for _ in range(2)]
    assert second.values() == values
    for updater in (first, second):
        updater.backward(updater.module.layer.weight.square().sum(), terms=1)
    assert first.step() == second.step()
    again = first.state(), second.state()
    assert all(torch.equal(again[0][name], again[1][name]) for name in model | {"optimizer.layer.weight.exp_avg"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t | {"model.layer.weight": torch.zeros(2, 4)},
            "layer.weight has shape (2, 4) there and has shape (2, 3) in",
        ),
        (lambda t: {k: v for k, v in t.items() if k != "model.kept"}, "kept is absent there and has shape (2,) in"),
        (lambda t: t | {"model.extra": torch.zeros(1)}, "extra has shape (1,) there and is absent in"),
    ],
    ids=["shape", "absent", "extra"],
)
def test_a_checkpoint_of_another_model_is_one_message_and_changes_nothing(change: Any, words: str) -> None:
    updater = learned(2)
    before = {name: tensor.clone() for name, tensor in updater.state().items()}
    with pytest.raises(InputError) as error:
        updater.restore(change(learned(4).state()), learned(4).values(), "runs/c/00000004")
    assert str(error.value).startswith(f"runs/c/00000004 is of another model: {words}")
    assert all(torch.equal(before[n], t) for n, t in updater.state().items() if n.startswith("model."))


def test_matrices_decay_and_vectors_do_not_and_a_prefix_has_its_own_rate() -> None:
    model = nn.ModuleDict(
        {"policy": nn.Linear(2, 2), "value": nn.Linear(2, 2), "cost_value": nn.Linear(2, 2)}
    )
    own = {name: Optimizer(lr=rate, weight_decay=0.3) for name, rate in (("value", 0.5), ("cost_value", 0.7))}
    updater = Updater(model, Optimizer(lr=0.1, weight_decay=0.3), FP32, 1, own)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in updater.optimizer.param_groups
        for parameter in group["params"]
    }
    assert seen == {
        f"{part}.{kind}": (rate, 0.3 if kind == "weight" else 0.0)
        for part, rate in (("policy", 0.1), ("value", 0.5), ("cost_value", 0.7))
        for kind in ("weight", "bias")
    }


def test_one_process_may_train_in_one_precision_and_then_in_another() -> None:
    for dtype, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        seen: list[torch.dtype] = []
        model = network()
        model[0].register_forward_hook(lambda module, inputs, output, s=seen: s.append(output.dtype))
        updater = Updater(model, PLAIN, Compute(dtype=dtype), total_updates=1)  # type: ignore[arg-type]
        output: Tensor = updater.model(torch.ones(1, 3))
        assert seen == [expected] and output.dtype == torch.float32
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_gradient_checkpointing_reaches_every_network_and_changes_no_gradient(policy_folder: Path) -> None:
    gradients = []
    ids = torch.tensor([[10, 11, 12, 13]])
    for checkpointing in (False, True):
        pair = nn.ModuleDict({"first": load_policy(policy_folder), "second": load_policy(policy_folder)})
        Updater(pair, PLAIN, Compute(dtype="fp32", gradient_checkpointing=checkpointing), total_updates=1)
        pair.train()
        assert [part.is_activation_checkpointing for part in pair.values()] == [checkpointing] * 2
        sum(part(ids).logits.square().mean() for part in pair.values()).backward()
        gradients.append([p.grad for p in pair.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
