"""The update loop's machinery: accumulation, schedule, clipping, bad gradients, interruption."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components import training
from components.checkpoints import Checkpoints
from components.models import load_policy
from components.optimizers import learning_rate_factor
from components.settings import Compute, Optimizer, Training
from components.tracking import Row
from components.training import Loss, fit
from components.updates import Updater

FP32 = Compute(dtype="fp32")
PLAIN = Optimizer(lr=0.1, schedule="constant", warmup=0.0, max_grad_norm=1e9)


@dataclass(frozen=True)
class Point:
    """A regression example that counts as `weight` terms and costs 8 tokens."""

    inputs: list[float]
    target: float
    weight: int


class Regression:
    """Weighted squared error."""

    def length(self, row: Point) -> int:
        return 8

    def terms(self, row: Point) -> int:
        return row.weight

    def loss(self, model: nn.Module, rows: Sequence[Point]) -> Loss:
        inputs, targets = (
            torch.tensor([row.inputs for row in rows]),
            torch.tensor([row.target for row in rows]),
        )
        weights = torch.tensor([float(row.weight) for row in rows])
        error = (model(inputs).squeeze(-1) - targets).square() * weights
        return Loss(error.sum(), {"train/weight": float(weights.sum())})


def points(count: int) -> list[Point]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 3, generator=generator)
    targets = (inputs @ torch.tensor([1.0, -2.0, 0.5])).tolist()
    return [
        Point(row, target, 1 + index % 5)
        for index, (row, target) in enumerate(zip(inputs.tolist(), targets, strict=True))
    ]


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))


def trained(
    model: nn.Module, rows: list[Point], settings: Training, folder: Path, every: int = 0
) -> dict[str, float]:
    return fit(
        model,
        Regression(),
        rows,
        settings,
        seed=1,
        label="test",
        evaluate=lambda: {"eval/loss": 0.0},
        checkpoints=Checkpoints(folder, every),
    )


def assert_same_weights(first: nn.Module, second: nn.Module, **tolerance: Any) -> None:
    for (name, left), right in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(left, right, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_two_half_batches_make_the_update_of_one_batch(tmp_path: Path) -> None:
    whole, halves = network(), network()
    common: dict[str, Any] = {"epochs": 3, "optimizer": PLAIN, "compute": FP32}
    rows = points(16)  # of unequal weights: a mean of the micro-batches' means would differ
    one = trained(whole, rows, Training(batch_tokens=128, accumulation=1, **common), tmp_path)
    two = trained(halves, rows, Training(batch_tokens=64, accumulation=2, **common), tmp_path)
    assert_same_weights(whole, halves, atol=1e-5, rtol=1e-5)
    assert one["loss/train"] == pytest.approx(two["loss/train"], rel=1e-5)
    assert one["train/weight"] == two["train/weight"] == 1
    with pytest.raises(AssertionError):
        assert_same_weights(whole, network())


def test_training_lowers_the_loss_and_repeats_exactly(tmp_path: Path) -> None:
    settings = Training(epochs=20, batch_tokens=64, optimizer=PLAIN, compute=FP32)
    first, second = network(), network()
    losses = [trained(model, points(32), settings, tmp_path)["loss/train"] for model in (first, second)]
    assert losses[0] == losses[1] < 1.0 < points_loss(network())
    assert_same_weights(first, second, atol=0, rtol=0)


def points_loss(model: nn.Module) -> float:
    rows = points(32)
    with torch.no_grad():
        return Regression().loss(model, rows).total.item() / sum(row.weight for row in rows)


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


def interrupt_at(update: int) -> Callable[..., Row]:
    def log_metrics(metrics: dict[str, float], number: int) -> Row:
        if number == update:
            raise KeyboardInterrupt
        return Row(number, 0.0, metrics)

    return log_metrics


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_training_interrupted_in_the_middle_ends_with_the_same_weights(
    dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Training(
        epochs=2, batch_tokens=64, accumulation=2, optimizer=Optimizer(lr=0.05, warmup=0.3), compute=FP32
    )
    straight = network(dropout)
    uninterrupted = trained(straight, points(64), settings, tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(training.tracking, "log_metrics", interrupt_at(6))
        with pytest.raises(KeyboardInterrupt):
            trained(network(dropout), points(64), settings, tmp_path / "b", every=2)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["00000002", "00000004"]
    resumed = network(dropout)
    metrics = trained(resumed, points(64), settings, tmp_path / "b", every=2)
    assert_same_weights(straight, resumed, atol=0, rtol=0)
    assert metrics == uninterrupted
    assert (tmp_path / "b" / "00000008").exists()  # until the caller has saved the model


def test_evaluation_comes_as_often_as_asked_and_at_the_end(tmp_path: Path) -> None:
    calls: list[int] = []

    def evaluate() -> dict[str, float]:
        calls.append(len(calls))
        return {"eval/loss": 1.0 / len(calls)}

    settings = Training(epochs=1, batch_tokens=64, eval_every=3, optimizer=PLAIN, compute=FP32)
    metrics = fit(
        network(), Regression(), points(64), settings, seed=0, label="test", evaluate=evaluate,
        checkpoints=Checkpoints(tmp_path, 0),
    )  # fmt: skip
    assert len(calls) == 3  # of 8 updates after 3, 6 and the last
    assert metrics["eval/loss"] == pytest.approx(1 / 3)


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
