"""The rl step killed at any update, or in sampling, and started again: it ends as if nobody had touched it.

The seven algorithms in both dtypes, with everything on that has a state of its own in one case or another.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch

from components.artifacts import Metrics, verify_manifest
from components.checkpoints import Checkpoints
from components.rl import loop
from components.rl import step as rl_step
from components.rl.settings import PtxSettings, RLSettings
from components.rl.step import run
from components.settings import FunctionScorerSettings, Lora
from components.termination import Terminated, watch
from starts import Ending, Stop, ending
from tiny_models import ALGORITHMS, ROLLOUT_UPDATES, ROLLOUTS, tiny_rl

CASES = [(algorithm, dtype) for algorithm in ALGORITHMS for dtype in ("fp32", "bf16")]
STATEFUL: dict[tuple[str, str], dict[str, Any]] = {
    ("ppo", "fp32"): {"algorithm": {"kl_target": 0.1, "kl_horizon": 16}, "share_backbone": True},
    ("ppo", "bf16"): {"ptx": PtxSettings(coef=1.0, batch_size=4)},
    ("ppo_lag", "fp32"): {"algorithm": {"multiplier": "pid", "cost_window": 12}},
    ("ppo_lag", "bf16"): {"algorithm": {"lambda_delay": 1, "kl_target": 0.1, "kl_horizon": 16}},
    ("rloo", "fp32"): {"lora": Lora(rank=2), "ptx": PtxSettings(coef=1.0, batch_size=4)},
    ("rloo", "bf16"): {"algorithm": {"kl_target": 0.1, "kl_horizon": 16}},
    ("grpo", "bf16"): {"lora": Lora(rank=2)},
    ("online_dpo", "fp32"): {"checkpoint_every": 0},
    ("dpo", "bf16"): {"checkpoint_every": 0, "lora": Lora(rank=2)},
}
"""What else has a state, by case."""
WHOLE = ROLLOUTS * ROLLOUT_UPDATES


@pytest.fixture
def inputs(data_folder: Path, policy_folder: Path, reward_folder: Path, cost_folder: Path) -> dict[str, Path]:
    return {"data": data_folder, "policy": policy_folder, "reward": reward_folder, "cost": cost_folder}


@pytest.fixture
def run_of(starts: Any, inputs: dict[str, Path], tmp_path: Path) -> Callable[..., Ending]:
    """Runs the step into a folder of the test's own, stopped where it says."""

    def made(settings: RLSettings, name: str, *stops: Stop) -> Ending:
        ended: Ending = starts.run("rl", settings, inputs, tmp_path / name, stops)
        return ended

    return made


@pytest.fixture
def plain() -> RLSettings:
    """PPO-Lag with a checkpoint after every rollout."""
    return tiny_rl("ppo_lag", "fp32", checkpoint_every=1)


@pytest.mark.parametrize(("algorithm", "dtype"), CASES)
def test_a_run_stopped_anywhere_and_started_again_ends_as_one_that_was_not(
    algorithm: str, dtype: str, run_of: Any, tmp_path: Path
) -> None:
    settings = tiny_rl(algorithm, dtype, **STATEFUL.get((algorithm, dtype), {}))
    whole = run_of(settings, "whole")
    assert whole.exit_codes == [0] and whole.starts[0].ended.updates == WHOLE
    assert [row["update"] for row in whole.history] == list(range(1, ROLLOUTS + 1))
    stopped = run_of(settings, "stopped", *random_stops(f"{algorithm} {dtype}"))
    assert stopped.exit_codes == [-9, 143, -9, 0]
    assert stopped.result == whole.result
    assert stopped.starts[1].late_updates <= 1
    assert stopped.starts[-1].ended.updates < WHOLE  # it did continue
    left = {path.parents[1].name.partition("-")[0] for path in tmp_path.rglob("tensors.safetensors")}
    assert left == ({"reference"} if algorithm == "dpo" else set())  # what later runs read too


def test_a_run_with_all_roles_on_one_backbone_is_continued_to_the_bit(
    run_of: Any, inputs: dict[str, Path], adapted_reward: Path, adapted_cost: Path
) -> None:
    inputs.update(reward=adapted_reward, cost=adapted_cost)
    settings = tiny_rl("ppo_lag", "fp32", share_backbone=True, lora=Lora(rank=2))
    whole = run_of(settings, "whole")
    stopped = run_of(settings, "stopped", *random_stops("one backbone"))
    assert stopped.exit_codes == [-9, 143, -9, 0] and stopped.result == whole.result
    assert all(start.log.count("shares the policy's backbone") == 2 for start in whole.starts)


def random_stops(seed: str) -> Iterator[Stop]:
    """Two kills and between them a SIGTERM, each in another rollout, at a random update of it or while it is made.

    The delay covers about an update.
    """
    draws = random.Random(seed)
    for rows, number in zip((0, 1, 2), (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL), strict=True):
        yield Stop(rows, draws.randrange(ROLLOUT_UPDATES), 0.01 * draws.random(), number)


def test_the_cases_have_every_algorithm_and_their_runs_raise_alerts(run_of: Any, plain: RLSettings) -> None:
    assert len(CASES) == 14 and STATEFUL.keys() <= set(CASES)
    assert run_of(plain, "plain").alerts


def test_after_sigterm_nothing_is_done_again_but_the_making_of_a_batch(run_of: Any) -> None:
    settings = tiny_rl("ppo", "fp32", checkpoint_every=0)
    whole = run_of(settings, "whole")
    stops = [Stop(0, 1, signal=signal.SIGTERM), Stop(1, 0, signal=signal.SIGTERM), Stop(2, 3, signal=signal.SIGTERM)]
    stopped = run_of(settings, "stopped", *stops)
    assert stopped.exit_codes == [143, 143, 143, 0] and stopped.result == whole.result
    assert sum(start.ended.updates for start in stopped.starts) == WHOLE
    assert max(start.late_updates for start in stopped.starts) <= 1
    assert all("the same command continues from the newest checkpoint" in start.log for start in stopped.starts[:3])


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-9], lambda content: content[:-9] + b"x" * 9], ids=["truncated", "altered"]
)
@pytest.mark.parametrize("name", ["tensors.safetensors", "values.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
    name: str, damage: Any, run_of: Any, starts: Any, inputs: Any, plain: RLSettings, tmp_path: Path
) -> None:
    whole, folder = run_of(plain, "whole"), tmp_path / "stopped"
    assert starts.start("rl", plain, inputs, folder, Stop(3, 1)).exit_code == -9
    before, newest = sorted(folder.glob("checkpoints/rl-*/0*"))
    assert [path.name for path in (before, newest)] == [f"{ROLLOUT_UPDATES * number:08d}" for number in (2, 3)]
    (newest / name).write_bytes(damage((newest / name).read_bytes()))
    last = starts.start("rl", plain, inputs, folder)
    assert f"{newest} is damaged ({name} not as written); using the one before it" in last.log
    assert last.ended.updates == WHOLE - 2 * ROLLOUT_UPDATES
    assert ending(folder).result == whole.result


def test_the_checkpoints_of_other_settings_are_left_alone(
    run_of: Any, starts: Any, inputs: Any, plain: RLSettings, tmp_path: Path
) -> None:
    folder, other = tmp_path / "stopped", plain.model_copy(update={"seed": plain.seed + 1})
    assert starts.start("rl", other, inputs, folder, Stop(2, 1)).exit_code == -9
    left = sorted(folder.rglob("*.safetensors"))
    ended = run_of(plain, "stopped")
    assert ended.starts[0].ended.updates == WHOLE and sorted(folder.glob("checkpoints/**/*.safetensors")) == left != []
    assert ended.result == run_of(plain, "whole").result


def test_a_step_tried_again_on_another_machine_continues_from_where_checkpoints_are_kept(
    run_of: Any, starts: Any, inputs: Any, plain: RLSettings, tmp_path: Path
) -> None:
    whole, kept = run_of(plain, "whole"), {"PLUMBLINE_CHECKPOINTS": str(tmp_path / "kept")}
    first = starts.start("rl", plain, inputs, tmp_path / "first", Stop(3, 2), environment=kept)
    assert first.exit_code == -9 and not (tmp_path / "first" / "checkpoints").exists()
    second = starts.start("rl", plain, inputs, tmp_path / "second", environment=kept, fresh=True)
    assert second.exit_code == 0 and second.ended.updates == WHOLE - 3 * ROLLOUT_UPDATES
    assert ending(tmp_path / "second").result == whole.result


class Rounds:
    """A reward that draws from every global random state, and asks the step to stop in one of its rounds."""

    def __init__(self, stop_in: int) -> None:
        self.stop_in, self.number = stop_in, 0

    def __call__(self, prompts: list[Any], responses: list[str]) -> list[float]:
        """Random scores."""
        self.number += 1
        scores = [random.gauss() + numpy.random.normal() + float(torch.randn(())) for _ in responses]
        if self.number == self.stop_in:
            ask()
        return scores


def ask() -> None:
    """What a cluster does before it takes a machine away; Python runs the handler at the next line."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0)


def run_here(settings: RLSettings, **paths: Any) -> Metrics:
    """The step in this process, its random states as in every other start; SIGTERM ends it, as in `launch`."""
    random.seed(1)
    numpy.random.seed(1)
    with watch() as stop, stop.interruptible():
        return run(settings, **paths)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The updates of which a checkpoint was written."""
    updates: list[int] = []
    save = Checkpoints.save

    def counted(self: Checkpoints, update: int, *state: Any) -> None:
        updates.append(update)
        save(self, update, *state)

    monkeypatch.setattr(Checkpoints, "save", counted)
    return updates


@pytest.mark.parametrize("every", [0, 1])
def test_a_reward_that_draws_random_numbers_draws_them_again_when_it_is_broken_off(
    every: int, inputs: Any, written: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ModuleType("own_rewards")
    monkeypatch.setitem(sys.modules, "own_rewards", own)
    reward = FunctionScorerSettings(name="own_rewards:rounds")
    settings = tiny_rl("rloo", "fp32", reward_scorer=reward, checkpoint_every=every)
    monkeypatch.setattr(own, "rounds", Rounds(stop_in=0), raising=False)
    whole = run_here(settings, **inputs, model=tmp_path / "a" / "m")
    monkeypatch.setattr(own, "rounds", Rounds(stop_in=3))
    written.clear()
    with pytest.raises(Terminated):
        run_here(settings, **inputs, model=tmp_path / "b" / "m")
    # Once each: the newest is not written again where it already is of the place at which the signal came.
    assert written == [number * ROLLOUT_UPDATES for number in ((1, 2) if every else (2,))]
    stopped = run_here(settings, **inputs, model=tmp_path / "b" / "m")
    assert timeless(stopped) == timeless(whole) and stopped["rollout/score_std"] > 0
    assert verify_manifest(tmp_path / "a" / "m") == verify_manifest(tmp_path / "b" / "m")


def timeless(metrics: Metrics) -> Metrics:
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


@pytest.mark.parametrize("lora", [Lora(), Lora(rank=2)], ids=["full", "adapters"])
def test_sigterm_while_the_model_is_saved_costs_no_training(
    lora: Lora, inputs: Any, written: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_rl("rloo", "fp32", lora=lora, checkpoint_every=0)
    whole = run_here(settings, **inputs, model=tmp_path / "a" / "m")

    def stopped_half_way(model: Any, *_: Any, **__: Any) -> None:
        ask()

    with monkeypatch.context() as patch:
        patch.setattr(rl_step, "save_model", stopped_half_way)
        with pytest.raises(Terminated):
            run_here(settings, **inputs, model=tmp_path / "b" / "m")
    assert written == [WHOLE]
    monkeypatch.setattr(loop._Loop, "_update", None)  # nothing is left to learn
    assert timeless(run_here(settings, **inputs, model=tmp_path / "b" / "m")) == timeless(whole)
    assert verify_manifest(tmp_path / "a" / "m") == verify_manifest(tmp_path / "b" / "m")
