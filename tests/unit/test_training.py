"""Supervised training: accumulation, evaluations, interruption at any place, and what a checkpoint brings back."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from components import storage, tracking, training
from components.checkpoints import Checkpoints
from components.settings import Compute, Optimizer, Training
from components.termination import Terminated
from components.tracking import Row
from components.training import Loss, fit

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
        finish=lambda metrics: None,
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


def test_what_is_done_at_the_beginning_sees_the_weights_that_were_given_also_where_a_checkpoint_follows(
    tmp_path: Path,
) -> None:
    settings = Training(epochs=4, batch_tokens=64, optimizer=PLAIN, compute=FP32)
    trained(network(), points(32), settings, tmp_path, every=1)
    model, seen = network(), list[nn.Module]()
    fit(
        model, Regression(), points(32), settings, seed=1, label="test", evaluate=lambda: {"eval/loss": 0.0},
        checkpoints=Checkpoints(tmp_path, 1), finish=lambda metrics: None, begin=lambda: seen.append(deepcopy(model)),
    )  # fmt: skip
    (first,) = seen
    assert_same_weights(first, network(), atol=0, rtol=0)
    with pytest.raises(AssertionError):
        assert_same_weights(model, network())


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
        checkpoints=Checkpoints(tmp_path, 0), finish=lambda metrics: None,
    )  # fmt: skip
    assert len(calls) == 3  # of 8 updates after 3, 6 and the last
    assert metrics["eval/loss"] == pytest.approx(1 / 3)


SOME_EVALUATIONS = Training(
    epochs=2, batch_tokens=64, accumulation=2, eval_every=3, optimizer=Optimizer(lr=0.05, warmup=0.3), compute=FP32
)
"""8 updates, evaluated after 3, 6 and the last."""


class Stopped(Regression):
    """Is sent SIGTERM at the n-th loss, evaluation or finish of this start, and evaluates with random numbers."""

    def __init__(self, at_loss: int = 0, at_evaluation: int = 0, at_finish: int = 0) -> None:
        self.losses, self.evaluations, self.finishes = at_loss, at_evaluation, at_finish
        self.saved: dict[str, float] = {}

    def loss(self, model: nn.Module, rows: Sequence[Point]) -> Loss:
        self.losses -= 1
        if self.losses == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(model, rows)

    def evaluate(self) -> dict[str, float]:
        self.evaluations -= 1
        drawn = float(torch.rand(()))
        if self.evaluations == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"eval/draw": drawn}

    def finish(self, metrics: dict[str, float]) -> None:
        self.finishes -= 1
        if self.finishes == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        self.saved = metrics


def start(
    objective: Stopped, folder: Path, every: int = 0, place: str = ""
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """The metrics and weights of a start of training, tracked in `folder`, with checkpoints below it or in `place`."""
    model = network(dropout=0.5)
    with tracking.track("test", {}, folder):
        metrics = fit(
            model, objective, points(64), SOME_EVALUATIONS, seed=1, label="test", evaluate=objective.evaluate,
            checkpoints=Checkpoints(place or folder / "checkpoints", every), finish=objective.finish,
        )  # fmt: skip
    return metrics, [parameter.detach().clone() for parameter in model.parameters()]


def history(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("time") > 0 for row in rows)
    return rows


@pytest.mark.parametrize("where", ["at_loss", "at_evaluation"])
def test_sigterm_anywhere_writes_a_checkpoint_and_training_goes_on_from_it(where: str, tmp_path: Path) -> None:
    metrics, weights = start(Stopped(), tmp_path / "whole")
    assert [row["update"] for row in history(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6, 7, 8]
    # a loss is one of an update's two micro-batches
    expected = [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8] if where == "at_loss" else [3, 6, 8]
    for number, update in enumerate(expected, start=1):
        folder = tmp_path / str(number)
        with pytest.raises(Terminated):
            start(Stopped(**{where: number}), folder)
        assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"{update:08d}"]
        logged = update - 1 if update in (3, 6, 8) else update  # the row of an update waits for its evaluation
        assert [row["update"] for row in history(folder)] == list(range(1, logged + 1))
        again = start(Stopped(), folder)
        assert again[0] == metrics and history(folder) == history(tmp_path / "whole")
        assert all(torch.equal(*pair) for pair in zip(again[1], weights, strict=True))


@pytest.mark.parametrize("every", [0, 8])
def test_sigterm_while_the_model_is_saved_costs_no_training(every: int, tmp_path: Path) -> None:
    metrics, weights = start(Stopped(), tmp_path / "whole")
    stopped, again = Stopped(at_finish=1), Stopped(at_loss=1, at_evaluation=1)  # neither is reached
    with pytest.raises(Terminated):
        start(stopped, tmp_path / "stopped", every)
    assert not stopped.saved
    (left,) = (tmp_path / "stopped" / "checkpoints").iterdir()
    written = left.stat().st_mtime_ns
    with pytest.raises(Terminated):
        start(Stopped(at_finish=1), tmp_path / "stopped", every)
    assert (left.name, left.stat().st_mtime_ns) == ("00000008", written)  # not written again: it might be lost
    assert start(again, tmp_path / "stopped", every)[0] == metrics == again.saved
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")
    assert (again.losses, again.evaluations) == (1, 1) and len(weights) == 4


def test_training_goes_on_in_another_place_from_a_checkpoint_in_an_object_store(store: str, tmp_path: Path) -> None:
    metrics, weights = start(Stopped(), tmp_path / "whole")
    with pytest.raises(Terminated):
        start(Stopped(at_loss=8), tmp_path / "first pod", every=3, place=f"{store}/c")  # in the fourth update
    assert storage.list_folders(f"{store}/c") == ["00000003", "00000004"]
    again = start(Stopped(), tmp_path / "second pod", every=3, place=f"{store}/c")
    assert again[0] == metrics and history(tmp_path / "second pod") == history(tmp_path / "whole")
    assert all(torch.equal(*pair) for pair in zip(again[1], weights, strict=True))


def test_rows_of_lost_updates_vanish_and_the_others_keep_their_times(tmp_path: Path) -> None:
    start(Stopped(), tmp_path / "whole")

    class Killed(Stopped):
        def loss(self, model: nn.Module, rows: Sequence[Point]) -> Loss:
            if self.losses == 1:
                raise KeyboardInterrupt
            return super().loss(model, rows)

    with pytest.raises(KeyboardInterrupt):
        start(Killed(at_loss=11), tmp_path / "killed", every=3)  # in the sixth update
    before = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert len(before) == 5
    start(Stopped(), tmp_path / "killed", every=3)
    after = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert after[:3] == before[:3]  # as in the checkpoint, times too
    assert history(tmp_path / "killed") == history(tmp_path / "whole")


def test_a_finished_training_whose_model_was_not_saved_gives_its_metrics_again(tmp_path: Path) -> None:
    first = start(Stopped(), tmp_path, every=4)
    second = start(Stopped(at_loss=1, at_evaluation=1), tmp_path, every=4)  # neither is reached
    assert first[0] == second[0]
    assert all(torch.equal(*pair) for pair in zip(first[1], second[1], strict=True))


def test_samples_and_tokens_are_counted(tmp_path: Path) -> None:
    metrics, _ = start(Stopped(), tmp_path)
    assert (metrics["data/samples"], metrics["data/tokens"]) == (2 * 64, 2 * 64 * 8)
