"""The rl step end to end, on a tiny policy with random reward and cost models."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from components import tracking
from components.artifacts import DataDir, ModelCard, read_manifest, verify_manifest
from components.errors import InputError
from components.generation import respond
from components.models import load_policy
from components.phases import PHASES, measurable_memory
from components.reward import step as reward
from components.reward.settings import RewardSettings
from components.rl import loop
from components.rl import step as rl_step
from components.rl.algorithm_settings import DPOSettings, PPOLagSettings, PPOSettings
from components.rl.reference import FrozenReference
from components.rl.settings import PtxSettings, RLSettings
from components.rl.step import run
from components.settings import Compute, Generation, Lora, Optimizer
from components.sft import step as sft
from components.sft.settings import SFTSettings
from components.tokens import load_tokenizer
from components.tracking import Row


@pytest.fixture
def settings() -> Callable[..., RLSettings]:
    def made(**fields: Any) -> RLSettings:
        defaults: dict[str, Any] = {
            "algorithm": PPOLagSettings(),
            "rollouts": 3,
            "prompts_per_rollout": 8,
            "minibatch_size": 4,
            "micro_batch_size": 2,
            "generation": Generation(max_new_tokens=6, max_prompt_tokens=24),
            "optimizer": Optimizer(lr=1e-3, schedule="constant", warmup=0.0),
            "critic_optimizer": Optimizer(lr=1e-3, schedule="constant", warmup=0.0),
            "compute": Compute(dtype="fp32"),
        }
        return RLSettings(**(defaults | fields))

    return made


@pytest.fixture
def inputs(data_folder: Path, policy_folder: Path, reward_folder: Path, cost_folder: Path) -> dict[str, Any]:
    return {"data": data_folder, "policy": policy_folder, "reward": reward_folder, "cost": cost_folder}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in load_policy(folder).named_parameters()}


def test_ppo_lag_writes_a_policy_and_its_metrics(
    settings: Any, inputs: dict[str, Any], tmp_path: Path
) -> None:
    metrics = run(settings(), **inputs, model=tmp_path / "m")
    expected = (
        "rollout/score rollout/cost rollout/kl_k1 rollout/kl_k3 rollout/length rollout/missing_eos "
        "policy/entropy policy/clip_fraction cost/lambda loss/policy loss/value loss/cost_value perf/seconds"
    )
    assert set(expected.split()) <= set(metrics)
    assert metrics["policy/first_ratio_gap"] < 1e-4 and metrics["loss/skipped_updates"] == 0
    assert 0 < metrics["policy/entropy"] < 5.8
    before, after = weights(inputs["policy"]), weights(tmp_path / "m")
    assert before.keys() == after.keys() and any(not torch.equal(before[n], after[n]) for n in before)
    card = ModelCard.read(tmp_path / "m")
    assert (card.kind, card.step) == ("policy", "rl")
    assert read_manifest(tmp_path / "m")["parents"] == {
        name: read_manifest(folder)["digest"] for name, folder in inputs.items()
    }
    verify_manifest(tmp_path / "m")


ONLINE = {"weights", "prefill", "decode", "score", "reference", "read", "update", "other"}
ALL_PHASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "ppo_lag": ({"ptx": PtxSettings(coef=1.0, batch_size=2), "checkpoint_every": 1}, ONLINE | {"ptx"}),
    "rloo": ({"epochs": 2}, ONLINE),
    "grpo": ({"lora": Lora(rank=2)}, ONLINE),
    "dpo": ({}, {"reference", "update", "other"}),
}


@pytest.mark.parametrize("name", ALL_PHASES)
def test_the_phases_of_every_rollout_add_up_to_its_seconds(
    settings: Any, inputs: dict[str, Any], tmp_path: Path, name: str
) -> None:
    fields, expected = ALL_PHASES[name]
    with tracking.track("rl", {}, tmp_path / "tracked") as tracker:
        run(settings(algorithm={"name": name}, **fields), **inputs, model=tmp_path / "m")
    rows = [row.metrics for row in tracker.history]
    found = [{phase: row[f"perf/{phase}_s"] for phase in PHASES if f"perf/{phase}_s" in row} for row in rows]
    later = {"checkpoint"} if "checkpoint_every" in fields else set()
    once = {"reference"} if name == "dpo" else set()  # it reads all pairs for the first batch
    assert [seconds.keys() for seconds in found] == [expected, expected - once | later, expected - once | later]
    for row, seconds in zip(rows, found, strict=True):
        assert sum(seconds.values()) == pytest.approx(row["perf/seconds"])
        rated = seconds.keys() - {"weights", "checkpoint", "other"}
        assert all(row[f"perf/{phase}_tokens_per_s"] > 0 for phase in rated)
        peaks = {metric for metric in row if metric.endswith("_peak_mb")}
        assert peaks == ({f"perf/{phase}_peak_mb" for phase in seconds} if measurable_memory() else set())
    assert "Where the time went" in (tmp_path / "tracked" / "report" / "report.html").read_text("utf-8")


def test_the_policy_starts_at_the_reference(settings: Any, inputs: dict[str, Any], tmp_path: Path) -> None:
    metrics = run(settings(rollouts=1), **inputs, model=tmp_path / "m")
    assert metrics["rollout/kl_k1"] == pytest.approx(0, abs=1e-4)
    assert metrics["rollout/kl_k3"] == pytest.approx(0, abs=1e-4)


def test_ppo_neither_needs_nor_reads_a_cost_model(
    settings: Any, inputs: dict[str, Any], tmp_path: Path
) -> None:
    made = settings(algorithm=PPOSettings())
    without = run(made, **(inputs | {"cost": None}), model=tmp_path / "a")
    with_cost = run(made, **inputs, model=tmp_path / "b")
    assert verify_manifest(tmp_path / "a") == verify_manifest(tmp_path / "b")
    assert "rollout/cost" not in with_cost and without["rollout/score"] == with_cost["rollout/score"]


def test_a_policy_that_says_yes_and_no_learns_not_to_say_what_people_rejected(
    settings: Any, data_folder: Path, policy_folder: Path, quick_training: Callable[..., Any], tmp_path: Path
) -> None:
    data = DataDir(data_folder)
    undecided = [
        replace(row, response="yes" if number % 2 else "no, never")
        for number, row in enumerate(data.demonstrations("train"))
    ]
    DataDir.write(tmp_path / "undecided", {("demonstrations", "train"): undecided}, {}, {})
    imitation = SFTSettings(training=quick_training(epochs=12))
    sft.run(imitation, data=tmp_path / "undecided", base=policy_folder, model=tmp_path / "sft")
    preference = RewardSettings(training=quick_training(epochs=3))
    reward.run(preference, data=data_folder, sft=tmp_path / "sft", model=tmp_path / "reward")
    made = settings(
        algorithm=PPOSettings(kl_coef=0.01),
        rollouts=12,
        prompts_per_rollout=32,
        minibatch_size=32,
        micro_batch_size=32,
        optimizer=Optimizer(lr=0.005, schedule="constant", warmup=0.0),
    )
    run(
        made,
        data=data_folder,
        policy=tmp_path / "sft",
        reward=tmp_path / "reward",
        cost=None,
        model=tmp_path / "m",
    )
    before, after = (share_rejected(tmp_path / name, data) for name in ("sft", "m"))
    assert before > 0.3
    assert after < 0.05


def share_rejected(folder: Path, data: DataDir) -> float:
    prompts = [row.prompt for row in data.prompts("train") for _ in range(4)]
    answers = respond(
        load_policy(folder), load_tokenizer(folder), prompts, Generation(max_new_tokens=6), seed=0
    )
    return sum("never" in answer.text for answer in answers) / len(answers)


@pytest.fixture
def on_one_backbone(inputs: dict[str, Any], adapted_reward: Path, adapted_cost: Path) -> dict[str, Any]:
    """Inputs whose reward and cost model were trained with adapters on the policy."""
    return inputs | {"reward": adapted_reward, "cost": adapted_cost}


def test_six_roles_on_one_backbone_learn_as_with_scorers_of_their_own(
    settings: Any, on_one_backbone: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, found = settings(lora=Lora(rank=4), share_backbone=True), dict[str, dict[str, float]]()
    apart = dict(on_one_backbone)
    for name in ("reward", "cost"):
        apart[name] = shutil.copytree(on_one_backbone[name], tmp_path / name)
        shutil.rmtree(apart[name] / "adapter")
    with caplog.at_level(logging.INFO, logger="components.scoring.shared"):
        for name, given in (("shared", on_one_backbone), ("apart", apart)):
            found[name] = run(made, **given, model=tmp_path / name / "m")
    said = [record.getMessage() for record in caplog.records if record.name == "components.scoring.shared"]
    assert [line.rpartition("/")[2] for line in said] == [
        "adapted-reward shares the policy's backbone",
        "adapted-cost shares the policy's backbone",
        *(f"{name} is loaded as a model of its own: it was trained without adapters (lora.rank is 0), or by an earlier "
          "version" for name in ("reward", "cost")),
    ]  # fmt: skip
    for name in (name for name in found["apart"] if not name.startswith("perf/")):
        assert found["shared"][name] == pytest.approx(found["apart"][name], rel=1e-3, abs=1e-4), name
    shared, alone = (weights(tmp_path / name / "m") for name in ("shared", "apart"))
    start = weights(on_one_backbone["policy"])
    assert max(float((shared[name] - start[name]).abs().max()) for name in start) > 1e-4
    for name in start:
        torch.testing.assert_close(shared[name], alone[name], atol=1e-4, rtol=1e-3)


def test_frozen_models_in_bf16_hardly_move_the_start(settings: Any, inputs: dict[str, Any], tmp_path: Path) -> None:
    full, half = (
        run(settings(rollouts=1, frozen_dtype=dtype), **inputs, model=tmp_path / dtype) for dtype in ("fp32", "bf16")
    )
    assert full["rollout/kl_k3"] < 1e-8 < half["rollout/kl_k3"] < 0.01
    for name in ("rollout/score", "rollout/cost"):
        assert half[name] == pytest.approx(full[name], abs=0.02) and half[name] != full[name]
    assert half["rollout/length"] == full["rollout/length"]
    assert half["policy/first_ratio_gap"] == full["policy/first_ratio_gap"]


def test_micro_batches_change_nothing_but_memory(
    settings: Any, inputs: dict[str, Any], tmp_path: Path
) -> None:
    for size in (1, 4):
        run(settings(micro_batch_size=size, rollouts=2), **inputs, model=tmp_path / str(size))
    one, four = (weights(tmp_path / str(size)) for size in (1, 4))
    for name in one:
        torch.testing.assert_close(one[name], four[name], atol=2e-4, rtol=1e-3)


VARIANTS: dict[str, dict[str, Any]] = {
    "ppo": {"algorithm": {"name": "ppo", "kl_target": 0.1, "kl_horizon": 50}},
    "ppo_lag": {"algorithm": {"name": "ppo_lag"}},
    "pid": {"algorithm": {"name": "ppo_lag", "multiplier": "pid"}, "share_backbone": True},
    "rloo": {"algorithm": {"name": "rloo"}, "lora": Lora(rank=4)},
    "grpo": {"algorithm": {"name": "grpo", "group_size": 4}},
    "online_dpo": {"algorithm": {"name": "online_dpo"}, "ptx": PtxSettings(coef=1.0, batch_size=2)},
    "best_of_k": {"algorithm": {"name": "best_of_k"}},
    "dpo": {"algorithm": {"name": "dpo"}},
}
"""Every algorithm, and what a policy can be trained with."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_run_ends_in_the_same_policy(
    variant: str, settings: Any, inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = settings(**VARIANTS[variant], rollouts=4, epochs=2, checkpoint_every=1)
    run(made, **inputs, model=tmp_path / "a" / "m")

    def stop(metrics: dict[str, float], number: int) -> Row:
        if number == 3:
            raise KeyboardInterrupt
        return Row(number, 0.0, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(loop.tracking, "log_metrics", stop)
        with pytest.raises(KeyboardInterrupt):
            run(made, **inputs, model=tmp_path / "b" / "m")
    logged: list[int] = []

    def log_metrics(metrics: dict[str, float], number: int) -> Row:
        logged.append(number)
        return Row(number, 0.0, metrics)

    monkeypatch.setattr(loop.tracking, "log_metrics", log_metrics)
    metrics = run(made, **inputs, model=tmp_path / "b" / "m")
    assert logged == [3, 4]
    assert metrics["loss/skipped_updates"] == 0 and metrics["loss/grad_norm"] > 0
    assert ("loss/ptx" in metrics) == (variant == "online_dpo")
    assert verify_manifest(tmp_path / "a" / "m") == verify_manifest(tmp_path / "b" / "m")


def test_bf16_computes_in_bf16_and_saves_float32(
    settings: Any, inputs: dict[str, Any], tmp_path: Path
) -> None:
    made = settings(compute=Compute(dtype="bf16", gradient_checkpointing=True), rollouts=1)
    metrics = run(made, **inputs, model=tmp_path / "m")
    assert metrics["loss/skipped_updates"] == 0
    assert metrics["policy/first_ratio_gap"] < 0.2
    assert metrics["rollout/kl_k3"] < 0.05
    assert load_policy(tmp_path / "m").dtype == torch.float32


def test_adapters_are_trained_and_merged(settings: Any, inputs: dict[str, Any], tmp_path: Path) -> None:
    metrics = run(settings(lora=Lora(rank=4)), **inputs, model=tmp_path / "m")
    assert metrics["policy/first_ratio_gap"] < 1e-4
    before, after = weights(inputs["policy"]), weights(tmp_path / "m")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all(name.endswith("_proj.weight") for name in changed)


def test_ppo_lag_without_a_cost_model_is_an_error(
    settings: Any, inputs: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"rl\.algorithm\.name is ppo_lag: it needs a cost model"):
        run(settings(), **(inputs | {"cost": None}), model=tmp_path / "m")


def test_no_prompts_is_an_error_that_says_what_to_set(
    settings: Any, inputs: dict[str, Any], tmp_path: Path
) -> None:
    DataDir.write(tmp_path / "empty", {}, {}, {})
    with pytest.raises(InputError, match=r"empty: no training prompts; give preprocess\.prompts"):
        run(settings(), **(inputs | {"data": tmp_path / "empty"}), model=tmp_path / "m")


def test_a_policy_without_a_tokenizer_is_an_error(
    settings: Any, inputs: dict[str, Any], tmp_path: Path
) -> None:
    load_policy(inputs["policy"]).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="no tokenizer"):
        run(settings(), **(inputs | {"policy": tmp_path / "bare"}), model=tmp_path / "m")


def test_a_model_that_is_no_scalar_model_is_an_error(
    settings: Any, inputs: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match=r"policy: card\.json says kind 'policy'; accepted: a reward or cost"
    ):
        run(settings(), **(inputs | {"reward": inputs["policy"]}), model=tmp_path / "m")


def test_temperature_zero_is_an_error(settings: Any, inputs: dict[str, Any], tmp_path: Path) -> None:
    greedy = settings(generation=Generation(temperature=0.0))
    with pytest.raises(InputError, match=r"rl\.generation\.temperature is 0"):
        run(greedy, **inputs, model=tmp_path / "m")


def test_in_bf16_too_the_policy_starts_at_its_reference(settings: Any, inputs: dict[str, Any], tmp_path: Path) -> None:
    metrics = run(settings(compute=Compute(dtype="bf16"), rollouts=1), **inputs, model=tmp_path / "m")
    assert abs(metrics["rollout/kl_k1"]) < 1e-6
    assert metrics["rollout/kl_k3"] < 1e-6


def test_a_dpo_run_started_again_reads_what_the_reference_said(
    settings: Any, inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = settings(algorithm={"name": "dpo"}, rollouts=7)  # more than two passes over 24 pairs
    read: list[int] = []
    logprobs = FrozenReference.logprobs

    def watched(self: FrozenReference, input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        read.append(len(input_ids))
        return logprobs(self, input_ids, *rest)

    loaded: list[str] = []
    init = FrozenReference.__init__

    def noted(self: FrozenReference, model: Any, dtype: str) -> None:
        loaded.append(dtype)
        init(self, model, dtype)

    monkeypatch.setattr(FrozenReference, "__init__", noted)
    monkeypatch.setattr(FrozenReference, "logprobs", watched)
    run(made, **inputs, model=tmp_path / "first")
    assert sum(read) == 2 * 24
    run(made, **inputs, model=tmp_path / "second")
    assert sum(read) == 2 * 24 and len(loaded) == 1  # nor is the reference loaded where nothing is left for it to read
    one, other = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(one[name], other[name]) for name in one)
    run(made, **(inputs | {"policy": tmp_path / "first"}), model=tmp_path / "third")
    assert sum(read) == 2 * 2 * 24  # another reference
    run(settings(algorithm={"name": "dpo"}, rollouts=1), **inputs, model=tmp_path / "fourth")
    assert sum(read) == 2 * 2 * 24 + 2 * 8  # no more pairs than the run learns from
    half = {"algorithm": {"name": "dpo"}, "rollouts": 7, "frozen_dtype": "bf16"}
    run(settings(**half, lora=Lora(rank=2)), **inputs, model=tmp_path / "fifth")
    assert sum(read) == 2 * 2 * 24 + 2 * 8  # the policy without adapters is no model in bf16
    run(settings(**half), **inputs, model=tmp_path / "sixth")
    assert sum(read) == 3 * 2 * 24 + 2 * 8


def test_dpo_samples_nothing_so_how_responses_are_sampled_does_not_matter(
    settings: Any, inputs: dict[str, Any], tmp_path: Path
) -> None:
    plain, greedy = (
        settings(algorithm=DPOSettings(), rollouts=1, generation=Generation(max_new_tokens=6, temperature=temperature))
        for temperature in (1.0, 0.0)
    )
    without_teachers = inputs | {"reward": None, "cost": None}
    metrics = [
        run(made, **without_teachers, model=tmp_path / str(number)) for number, made in enumerate((plain, greedy))
    ]
    assert metrics[0]["loss/policy"] == metrics[1]["loss/policy"] > 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"generation": Generation(max_new_tokens=4, top_p=0.9)}, "top_p 0.9"),
        ({"generation": Generation(max_new_tokens=4, top_k=5)}, "top_k 5"),
        ({"lora": Lora(rank=2, dropout=0.1)}, "rl.lora.dropout is 0.1"),
    ],
)
def test_what_would_train_another_distribution_than_the_sampled_one_is_refused(
    settings: Any, inputs: dict[str, Any], tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        run(settings(**fields), **inputs, model=tmp_path / "m")


def test_training_is_not_lost_when_the_model_cannot_be_saved(
    settings: Any, inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLUMBLINE_CHECKPOINTS", str(tmp_path / "checkpoints"))
    made = settings(rollouts=2, checkpoint_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(rl_step, "save_model", full_disk)
        with pytest.raises(OSError, match="no space"):
            run(made, **inputs, model=tmp_path / "m")
    assert list((tmp_path / "checkpoints").rglob("tensors.safetensors"))
    monkeypatch.setattr(loop._Loop, "_update", None)  # nothing is left to learn
    metrics = run(made, **inputs, model=tmp_path / "m")
    assert "rollout/score" in metrics
    verify_manifest(tmp_path / "m")
    assert not list((tmp_path / "checkpoints").rglob("tensors.safetensors"))


def full_disk(*args: Any, **fields: Any) -> None:
    raise OSError("no space left on device")
