"""The RL loop on a problem of a few numbers: what it adds up, skips and logs, and that it goes on where it stopped."""

import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components.checkpoints import Checkpoints
from components.monitoring import Monitor
from components.phases import Phases
from components.rl.course import Course
from components.rl.loop import averages, num_updates, ratio_gap, train
from components.rl.settings import RLSettings
from components.rl.types import Batch, Forward, Means, State
from components.settings import Compute, Optimizer
from components.termination import Terminated
from components.updates import Updater

VOCABULARY, LENGTH = 5, 3
NEVER = -1


class Table(nn.Module):
    """A policy that says every token with a probability of its own, whatever came before."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(-1, 1, VOCABULARY))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, response_length: int) -> Forward:
        logprobs = self.logits.log_softmax(0)
        return Forward(logprobs[input_ids[:, -response_length:]], torch.zeros(len(input_ids), response_length))


@dataclass
class Numbers:
    """A source whose batches depend on the policy, on its own random state, and on nothing else."""

    table: Table
    kept: Callable[[int], int] = lambda number: 8
    """Rows that batch `number` has."""
    stop_at: int = NEVER
    """The batch in the middle of which SIGTERM comes."""
    learner: Any = None
    shift: float = 0.0
    """What the old log-probabilities are off by."""
    rows_per_batch: int = 8
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(3))

    def batch(self, number: int) -> Batch:
        probabilities = self.table.logits.detach().softmax(0).expand(self.rows_per_batch, -1)
        ids = torch.multinomial(probabilities, LENGTH, replacement=True, generator=self.generator)
        self.learner.rollouts += 1
        if number == self.stop_at:
            self.stop_at = NEVER
            os.kill(os.getpid(), signal.SIGTERM)
        mask = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (len(ids), 1), generator=self.generator)
        ids, mask = ids[: self.kept(number)], mask[: self.kept(number)]
        logprobs = self.table.logits.detach().log_softmax(0)[ids] + self.shift
        metrics, scatter = {"rollout/score": float(number)}, [(float(ids.sum()), 0.5)]
        return Batch(ids, torch.ones_like(mask), mask, logprobs, metrics=metrics, scatter=scatter)

    def state(self) -> State:
        state = self.generator.get_state()
        return lambda: {"random.numbers": state}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.generator.set_state(tensors["random.numbers"])


class Likelihood:
    """Raises the likelihood of token 0, the more the more rollouts and updates there were."""

    def __init__(self, stop_at: int = NEVER, bad_at: int = NEVER) -> None:
        self.rollouts = self.updates = self.calls = 0
        self.stop_at, self.bad_at = stop_at, bad_at

    def terms(self, batch: Batch) -> float:
        return float(batch.mask.sum())

    def loss(self, batch: Batch, forward: Forward) -> tuple[Tensor, Means]:
        self.calls += 1
        if self.calls == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.updates += 1
        weight = math.nan if self.calls == self.bad_at else 1 + 0.1 * self.rollouts + 0.01 * self.updates
        liked = (batch.input_ids == 0).float() - 0.5
        total = -(weight * liked * forward.logprobs).masked_fill(~batch.mask, 0.0).sum()
        return total, {"loss/policy": (total.item(), self.terms(batch)), "policy/rows": (float(len(batch)), 1.0)}

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self.rollouts, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rollouts, self.updates = state["rollouts"], state["updates"]


@dataclass
class Run:
    """A run and what it left behind."""

    course: Course
    table: Table
    learner: Likelihood
    updater: Updater

    @property
    def history(self) -> list[tuple[int, dict[str, float]]]:
        """The rows without times."""
        return [
            (row.update, {k: v for k, v in row.metrics.items() if not k.startswith("perf/")})
            for row in self.course.history
        ]


def settings(**fields: Any) -> RLSettings:
    defaults: dict[str, Any] = {
        "algorithm": {"name": "rloo"},
        "rollouts": 3,
        "prompts_per_rollout": 8,
        "minibatch_size": 3,
        "micro_batch_size": 2,
        "optimizer": Optimizer(lr=0.1, warmup=0.2),
        "compute": Compute(dtype="fp32"),
    }
    return RLSettings(**(defaults | fields))


def run(
    given: RLSettings,
    folder: Path,
    learner: Likelihood | None = None,
    extras: Any = (),
    every: int = 0,
    phases: Phases | None = None,
    **source: Any,
) -> Run:
    """Train a table from the newest checkpoint in `folder`, or from the start."""
    table, learner = Table(), learner or Likelihood()
    numbers = Numbers(table, learner=learner, **source)
    updates = num_updates(given, given.rollouts, numbers.rows_per_batch)
    updater = Updater(table, given.optimizer, given.compute, updates)
    checkpoints = Checkpoints(folder, every)
    monitor = Monitor([])
    course = train(given, given.rollouts, learner, numbers, updater, extras, monitor, checkpoints, phases=phases)
    return Run(course, table, learner, updater)


def assert_same(first: Run, second: Run) -> None:
    assert torch.equal(first.table.logits, second.table.logits)
    assert first.history == second.history
    assert first.learner.state_dict() == second.learner.state_dict()
    assert first.updater.values() == second.updater.values()
    assert first.course.scatter == second.course.scatter and first.course.number == second.course.number


# 3 batches of 8 rows, 2 passes in minibatches of 3, 3 and 2 rows, of 2, 2 and 1 micro-batches: 10 calls in each
@pytest.mark.parametrize("call", range(1, 31))
def test_stopped_at_any_update_the_run_ends_the_same(call: int, tmp_path: Path) -> None:
    given = settings(epochs=2)
    straight = run(given, tmp_path / "a")
    assert straight.learner.calls == 30 and straight.updater.update == 18
    with pytest.raises(Terminated):
        run(given, tmp_path / "b", Likelihood(stop_at=call))
    resumed = run(given, tmp_path / "b")
    assert resumed.learner.calls <= 30 - call  # nothing is done twice
    assert_same(straight, resumed)


def test_stopped_after_every_update_the_run_ends_the_same(tmp_path: Path) -> None:
    given, stops = settings(epochs=2), 0
    straight = run(given, tmp_path / "a")
    while True:
        try:
            resumed = run(given, tmp_path / "b", Likelihood(stop_at=1))
        except Terminated:
            stops += 1
        else:
            break
    assert stops == 18
    assert_same(straight, resumed)


@pytest.mark.parametrize("number", range(3))
def test_stopped_while_sampling_the_batch_is_sampled_again(number: int, tmp_path: Path) -> None:
    given = settings(epochs=2)
    straight = run(given, tmp_path / "a")
    with pytest.raises(Terminated):
        run(given, tmp_path / "b", stop_at=number)
    assert_same(straight, run(given, tmp_path / "b"))


@pytest.mark.parametrize("call", [4, 12, 25])
def test_killed_at_once_the_run_goes_on_from_the_last_checkpoint_that_was_due(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(epochs=2)
    straight = run(given, tmp_path / "a")

    class Killed(BaseException):
        pass

    class Fragile(Likelihood):
        def loss(self, batch: Batch, forward: Forward) -> tuple[Tensor, Means]:
            if self.calls == call:
                raise Killed
            return super().loss(batch, forward)

    with pytest.raises(Killed):
        run(given, tmp_path / "b", Fragile(), every=1)
    done = call // 10
    assert len(list((tmp_path / "b").glob("[0-9]*"))) == done
    resumed = run(given, tmp_path / "b", every=1)
    assert resumed.learner.calls == 30 - 10 * done
    assert_same(straight, resumed)


def test_a_run_that_is_done_learns_nothing_more(tmp_path: Path) -> None:
    first = run(settings(), tmp_path, every=1)
    again = run(settings(), tmp_path, every=1)
    assert again.learner.calls == 0
    assert_same(first, again)


def test_an_empty_batch_makes_no_update_and_training_goes_on(tmp_path: Path) -> None:
    given = settings()
    made = run(given, tmp_path, kept=lambda number: 0 if number == 1 else 8)
    rows = [metrics for _, metrics in made.history]
    assert [row["data/updates"] for row in rows] == [3, 0, 3]
    assert [row["rollout/score"] for row in rows] == [0, 1, 2]
    assert "loss/policy" not in rows[1] and "policy/first_ratio_gap" not in rows[1] and "loss/policy" in rows[2]
    assert made.updater.samples == 16


@pytest.mark.parametrize("number", range(3))
def test_an_empty_batch_survives_a_stop(number: int, tmp_path: Path) -> None:
    def kept(number: int) -> int:
        return 0 if number == 1 else 8

    straight = run(settings(), tmp_path / "a", kept=kept)
    with pytest.raises(Terminated):
        run(settings(), tmp_path / "b", kept=kept, stop_at=number)
    assert_same(straight, run(settings(), tmp_path / "b", kept=kept))


def test_the_learning_rate_follows_the_plan_when_rows_are_dropped(tmp_path: Path) -> None:
    given = settings(rollouts=4, optimizer=Optimizer(lr=0.1, schedule="linear", warmup=0.0, min_lr=0.0))
    whole = run(given, tmp_path / "a")
    dropped = run(given, tmp_path / "b", kept=lambda number: [8, 2, 0, 8][number])
    assert whole.updater.update == dropped.updater.update == num_updates(given, 4, 8) == 12
    rates = [[metrics.get("loss/lr") for _, metrics in made.history] for made in (whole, dropped)]
    # the mean over a batch's updates of 1 - update / 12
    assert rates[0] == pytest.approx([0.1 * (1 - (3 * batch + 1) / 12) for batch in range(4)])
    assert rates[1] == [pytest.approx(rates[0][0]), pytest.approx(0.1 * (1 - 3 / 12)), None, pytest.approx(rates[0][3])]


def test_updates_are_planned_from_rows_passes_and_minibatches() -> None:
    assert num_updates(settings(epochs=2, minibatch_size=3), 5, 8) == 5 * 2 * 3
    assert num_updates(settings(epochs=1, minibatch_size=8), 5, 8) == 5
    assert num_updates(settings(epochs=1, minibatch_size=9), 5, 8) == 5


@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.parametrize(("epochs", "size"), [(1, 2), (2, 4), (1, 6), (3, 100)])
def test_a_batch_has_the_updates_that_were_planned(unit: int, epochs: int, size: int) -> None:
    rows = torch.zeros(20, 3)
    batch = Batch(rows, rows, rows, unit=unit)
    assert len(batch.plan(epochs, size, 0)) == num_updates(settings(epochs=epochs, minibatch_size=size), 1, 20)


@pytest.mark.parametrize("name", ["dpo", "online_dpo"])
def test_a_minibatch_that_would_part_a_pair_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"minibatch_size is 5; {name} learns from pairs.*make it even"):
        settings(algorithm={"name": name}, minibatch_size=5)
    assert settings(algorithm={"name": name}, minibatch_size=6).minibatch_size == 6


def test_a_loss_that_is_not_finite_is_skipped_counted_and_left_behind(tmp_path: Path) -> None:
    given = settings(micro_batch_size=8)
    made = run(given, tmp_path, Likelihood(bad_at=4))  # the first update of the second batch
    rows = [metrics for _, metrics in made.history]
    assert [row["loss/skipped_updates"] for row in rows] == [0, 1, 1]
    assert math.isnan(rows[1]["loss/policy"]) and math.isfinite(rows[2]["loss/policy"])
    assert made.updater.update == 9 and torch.isfinite(made.table.logits).all()
    only = run(settings(rollouts=1, minibatch_size=8, micro_batch_size=8), tmp_path / "b", Likelihood(bad_at=1))
    assert torch.equal(only.table.logits, Table().logits)


def test_micro_batches_change_no_weight_and_no_metric(tmp_path: Path) -> None:
    class Flat(Likelihood):
        """Its weight does not depend on how often it is asked."""

        def loss(self, batch: Batch, forward: Forward) -> tuple[Tensor, Means]:
            self.updates = 0
            return super().loss(batch, forward)

    one, all_at_once = (run(settings(micro_batch_size=n), tmp_path / str(n), Flat()) for n in (1, 8))
    torch.testing.assert_close(one.table.logits, all_at_once.table.logits)
    for (_, first), (_, second) in zip(one.history, all_at_once.history, strict=True):
        assert first["loss/policy"] == pytest.approx(second["loss/policy"], rel=1e-4)
        assert first["loss/grad_norm"] == pytest.approx(second["loss/grad_norm"], rel=1e-4)


def test_means_are_over_micro_batches_by_count_then_over_updates(tmp_path: Path) -> None:
    # Minibatches of 3, 3, 2 rows in micro-batches of 2, 1 | 2, 1 | 2: rows per micro-batch 1.5, 1.5, 2
    made = run(settings(rollouts=1), tmp_path)
    metrics = made.history[0][1]
    assert metrics["policy/rows"] == pytest.approx((1.5 + 1.5 + 2) / 3)
    assert metrics["data/samples"] == 8 and metrics["data/updates"] == 3
    assert metrics["data/tokens"] == made.updater.tokens
    assert averages([{"a": 1.0, "b": 2.0}, {"a": 4.0}]) == {"a": 2.5, "b": 2.0}
    assert averages([]) == {}


def test_the_gap_between_the_trained_and_the_sampling_policy_is_reported(tmp_path: Path) -> None:
    none = run(settings(rollouts=1), tmp_path / "a").history[0][1]
    assert none["policy/first_ratio_gap"] == 0 < none["policy/ratio_gap"]  # the mean has the later updates in it
    shifted = run(settings(rollouts=1), tmp_path / "b", shift=-0.1).history[0][1]
    assert shifted["policy/first_ratio_gap"] == pytest.approx(math.exp(0.1) - 1, rel=1e-4)


def test_the_gap_is_the_largest_of_response_tokens_on_either_side() -> None:
    mask = torch.tensor([[True, True, False]])
    ids = torch.zeros(1, 3).long()
    for away, expected in (([0.1, -0.3, 9.0], 1 - math.exp(-0.3)), ([0.3, -0.1, 9.0], math.exp(0.3) - 1)):
        batch = Batch(ids, mask, mask, torch.zeros(1, 3))
        assert ratio_gap(batch, Forward(torch.tensor([away]), torch.zeros(1, 3))) == pytest.approx(expected)
    assert ratio_gap(Batch(ids, mask, mask), Forward(torch.ones(1, 3), torch.zeros(1, 3))) == 0


def test_rows_that_no_policy_sampled_have_no_gap(tmp_path: Path) -> None:
    class Labelled(Numbers):
        def batch(self, number: int) -> Batch:
            made = super().batch(number)
            return Batch(made.input_ids, made.attention_mask, made.mask)

    given, table, learner = settings(rollouts=1), Table(), Likelihood()
    source = Labelled(table, learner=learner)
    updater = Updater(table, given.optimizer, given.compute, 3)
    course = train(given, 1, learner, source, updater, [], Monitor([]), Checkpoints(tmp_path, 0))
    assert not [name for name in course.history[0].metrics if "ratio" in name]


def test_extras_add_to_every_update_before_it_is_made(tmp_path: Path) -> None:
    class Pull:
        """Adds the gradient of 7 times the first logit."""

        def __init__(self) -> None:
            self.updates: list[int] = []

        def backward(self, updater: Updater) -> dict[str, float]:
            self.updates.append(updater.update)
            updater.backward(7.0 * updater.model.logits[0], 1.0)
            return {"loss/pull": 7.0}

    free = Optimizer(lr=0.1, max_grad_norm=1e9)
    pull = Pull()
    given = settings(rollouts=1, optimizer=free)
    plain, pulled = run(given, tmp_path / "a"), run(given, tmp_path / "b", extras=[pull])
    assert pull.updates == [0, 1, 2]
    assert pulled.history[0][1]["loss/pull"] == 7
    assert pulled.history[0][1]["loss/grad_norm"] > 6 > plain.history[0][1]["loss/grad_norm"]
    assert pulled.table.logits[0] < plain.table.logits[0]


def test_the_order_of_rows_differs_from_batch_to_batch_and_follows_the_seed(tmp_path: Path) -> None:
    class Seen(Likelihood):
        """Remembers the rows of every update."""

        def __init__(self) -> None:
            super().__init__()
            self.rows: list[list[int]] = []

        def loss(self, batch: Batch, forward: Forward) -> tuple[Tensor, Means]:
            self.rows.append(batch.input_ids.sum(1).tolist())
            return super().loss(batch, forward)

    class Same(Numbers):
        """The same rows in every batch, each with a sum of its own."""

        def batch(self, number: int) -> Batch:
            made = super().batch(number)
            ids = torch.stack([torch.arange(8) // 4, torch.arange(8) % 4, torch.zeros(8).long()], 1)
            ids[4:, 0] = 4
            return Batch(ids, made.mask, made.mask, made.logprobs)

    def order(seed: int, name: str) -> list[list[int]]:
        given, table, learner = settings(rollouts=2, seed=seed, micro_batch_size=8), Table(), Seen()
        updater = Updater(table, given.optimizer, given.compute, 6)
        source = Same(table, learner=learner)
        train(given, 2, learner, source, updater, [], Monitor([]), Checkpoints(tmp_path / name, 0))
        return learner.rows

    first = order(0, "a")
    for rows in (first[:3], first[3:]):
        assert sorted(number for update in rows for number in update) == list(range(8))
    assert first[:3] != first[3:]
    assert order(0, "b") == first != order(1, "c")


def test_the_phases_of_a_batch_add_up_and_a_checkpoint_belongs_to_the_batch_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    for owner, name, seconds in ((Numbers, "batch", 10.0), (Updater, "step", 1.0), (Checkpoints, "save", 100.0)):
        monkeypatch.setattr(owner, name, lasting(getattr(owner, name), seconds, clock))
    phases = Phases(clock=lambda: clock[0])
    clock[0] = 1e6  # as long as it takes to load everything
    course = run(settings(rollouts=3), tmp_path, every=2, phases=phases).course
    first, second, third = (
        {name: value for name, value in row.metrics.items() if name.startswith("perf/")} for row in course.history
    )
    made = {"perf/update_s": 3, "perf/update_tokens_per_s": 8 * LENGTH / 3, "perf/other_s": 10}
    assert first == second == made | {"perf/seconds": 13}
    assert third == made | {"perf/checkpoint_s": 100, "perf/seconds": 113}


def lasting(function: Callable[..., Any], seconds: float, clock: list[float]) -> Callable[..., Any]:
    """The function, during which time passes."""

    def slow(*args: Any, **fields: Any) -> Any:
        clock[0] += seconds
        return function(*args, **fields)

    return slow


def test_a_batch_that_a_stop_parted_is_timed_from_the_start_that_ends_it(tmp_path: Path) -> None:
    with pytest.raises(Terminated):
        run(settings(rollouts=1), tmp_path, Likelihood(stop_at=1))
    (row,) = run(settings(rollouts=1), tmp_path).course.history
    seconds = {name: value for name, value in row.metrics.items() if name.startswith("perf/") and "tokens" not in name}
    assert seconds.keys() == {"perf/update_s", "perf/other_s", "perf/seconds"}
    assert sum(seconds.values()) == pytest.approx(2 * seconds["perf/seconds"])


def test_the_scatter_of_the_first_and_of_the_last_rollout_is_kept(tmp_path: Path) -> None:
    course = run(settings(), tmp_path).course
    assert set(course.scatter) == {"first", "last"} and course.scatter["first"] != course.scatter["last"]
