"""The rl step with a process of its own that samples ahead: the numbers it has, and how it ends and goes on."""

import json
import multiprocessing
import os
import signal
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from components.artifacts import verify_manifest
from components.errors import InputError
from components.generation.overlap import Overlap
from components.rl import step as rl_step
from components.rl.ahead import Ahead
from components.rl.algorithm_settings import DPOSettings
from components.rl.settings import RLSettings
from components.rl.step import run
from components.settings import FunctionScorerSettings, Lora, Optimizer, OverlapSettings
from components.termination import Terminated, watch
from components.tracking import track
from tiny_models import ROLLOUT_UPDATES, ROLLOUTS, tiny_rl

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run_here(
    data_folder: Path, policy_folder: Path, reward_folder: Path, cost_folder: Path, tmp_path: Path, monkeypatch: Any
) -> Run:
    """Runs the step into a folder of the test's own; what it left there, without times."""
    monkeypatch.setattr(rl_step, "write_report", lambda *_: None)
    transformers_logging.disable_progress_bar()
    inputs = {"data": data_folder, "policy": policy_folder, "reward": reward_folder, "cost": cost_folder}

    def made(settings: RLSettings, name: str) -> dict[str, Any]:
        folder = tmp_path / name
        with (
            watch() as stop,
            stop.interruptible(),
            track("rl", settings.model_dump(mode="json"), folder) as tracker,
        ):
            tracker.finish(run(settings, **inputs, model=folder / "model"))
        assert not multiprocessing.active_children()
        return {"digest": verify_manifest(folder / "model"), "history": history(folder)}

    return made


def history(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{n: x for n, x in row.items() if n != "time" and not n.startswith("perf/")} for row in rows]


@pytest.mark.parametrize(
    ("algorithm", "dtype", "fields"), [("ppo_lag", "fp32", {}), ("rloo", "bf16", {"lora": Lora(rank=2)})]
)
def test_with_no_staleness_every_number_is_that_of_no_overlap(
    algorithm: str, dtype: str, fields: dict[str, Any], run_here: Run
) -> None:
    plain = run_here(tiny_rl(algorithm, dtype, **fields), "plain")
    overlapped = run_here(tiny_rl(algorithm, dtype, overlap=OverlapSettings(staleness=0), **fields), "overlapped")
    assert [row.pop("sampler/staleness") for row in overlapped["history"]] == [0.0] * ROLLOUTS
    assert overlapped == plain


def ask(*_: Any) -> None:
    """What a cluster does before it takes a machine away."""
    os.kill(os.getpid(), signal.SIGTERM)


def at_call(number: int, act: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which at call `number` (from 1 on) acts first."""
    calls = [0]

    def acting(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            act(*given)
        return function(*given, **named)

    return acting


class Killed(BaseException):
    """In the place of SIGKILL: nothing is kept but what checkpoints hold."""


def killed(*_: Any) -> None:
    raise Killed


def kill_sampler(overlap: Overlap, *_: Any) -> None:
    """Kill the process in which drafts are made."""
    assert overlap._process is not None
    os.kill(overlap._process._process.pid, signal.SIGKILL)


def test_a_stale_run_stopped_anywhere_goes_on_with_the_same_numbers_and_samples_nothing_twice(
    run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_rl("ppo_lag", "fp32", overlap=OverlapSettings(staleness=2), checkpoint_every=2)
    asked: list[int] = []
    ask_for = Overlap.ask

    def counted(self: Overlap, number: int, version: int) -> None:
        asked.append(number)
        ask_for(self, number, version)

    monkeypatch.setattr(Overlap, "ask", counted)
    whole = run_here(settings, "whole")
    assert [row["sampler/staleness"] for row in whole["history"]] == [0, 1, 2, 2, 2]
    assert whole["history"][0]["sampler/weight"] == pytest.approx(1, abs=1e-4)
    assert all(0 < row["sampler/effective"] < 1 for row in whole["history"][1:])
    assert asked == list(range(ROLLOUTS))
    asked.clear()
    with monkeypatch.context() as patch:  # while the trainer waits for the second batch
        patch.setattr(Overlap, "wait", at_call(2, ask, Overlap.wait))
        with pytest.raises(Terminated):
            run_here(settings, "stopped")
    kept = queued(tmp_path / "stopped")
    assert kept >= {1, 2} and asked == [0, 1, 2, 3]
    asked.clear()
    with monkeypatch.context() as patch:  # in the middle of the third, after a checkpoint in the place of the second
        step = rl_step.Updater.step
        patch.setattr(rl_step.Updater, "step", at_call(ROLLOUT_UPDATES + 2, killed, step))
        with pytest.raises(Killed):
            run_here(settings, "stopped")
    assert queued(tmp_path / "stopped") == {2, 3} and asked == list(range(max(kept) + 1, ROLLOUTS))
    asked.clear()
    with monkeypatch.context() as patch:  # and the sampler itself
        patch.setattr(Overlap, "wait", at_call(1, kill_sampler, Overlap.wait))
        assert run_here(settings, "stopped") == whole
    assert asked == [4]
    assert not list(tmp_path.rglob("tensors.safetensors"))


def queued(folder: Path) -> set[int]:
    """The drafts in the newest checkpoint."""
    newest = sorted(folder.glob("checkpoints/rl-*/0*"))[-1]
    names = [name.split(".") for name in load_file(newest / "tensors.safetensors") if name.startswith("queue.")]
    return {int(parts[1]) for parts in names if parts[1] != "next"}


def own_scores(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> FunctionScorerSettings:
    """A scorer that the process finds as a person's own."""
    (folder / "own_scores.py").write_text(f"def score(prompts, responses):\n    return {code}\n")
    monkeypatch.syspath_prepend(str(folder))
    return FunctionScorerSettings(name="own_scores:score")


def test_a_stale_run_learns(run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = own_scores(tmp_path, monkeypatch, "[-len(response) / 10 for response in responses]")
    quick = Optimizer(lr=1e-2, schedule="constant", warmup=0.0)
    sizes = {"rollouts": 12, "prompts_per_rollout": 8, "minibatch_size": 16, "micro_batch_size": 32}
    settings = tiny_rl("rloo", "fp32", overlap=OverlapSettings(), reward_scorer=short, optimizer=quick, **sizes)
    scores = [row["rollout/score"] for row in run_here(settings, "short")["history"]]
    assert statistics.mean(scores[:3]) < -0.6 and statistics.mean(scores[-3:]) > -0.2


def test_scores_that_nothing_can_be_learned_from_end_the_step_with_the_scorers_own_message(
    run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = own_scores(tmp_path, monkeypatch, "[float('nan')] * len(prompts)")
    with pytest.raises(InputError, match=r"^rl\.reward_scorer\.name \(own_scores:score\): 8 of 8 scores are not"):
        run_here(tiny_rl("ppo", "fp32", overlap=OverlapSettings(), reward_scorer=broken), "broken")
    assert not multiprocessing.active_children()


def test_what_samples_nothing_has_nothing_to_overlap() -> None:
    with pytest.raises(ValueError, match=r"overlap is set and algorithm\.name is dpo, which learns from"):
        RLSettings(algorithm=DPOSettings(), overlap=OverlapSettings())


def test_the_process_that_trains_loads_neither_reference_nor_scorers(
    run_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.rl import sources

    monkeypatch.setattr(sources, "build_reference", None)
    monkeypatch.setattr(sources, "build_scorer", None)
    monkeypatch.setattr(Ahead, "draft", killed)
    with pytest.raises(Killed):  # everything was built
        run_here(tiny_rl("ppo_lag", "fp32", overlap=OverlapSettings()), "built")
