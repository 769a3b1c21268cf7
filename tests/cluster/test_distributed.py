"""Two processes (gloo) against one: the same data gives the same losses and weights, whatever they divide.

All jobs of one kind run in one torchrun, because starting it costs more than they do. The single process takes twice
the accumulation. ZeRO compiles for a minute or so where it has never run.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from components.adapters import CONFIG, WEIGHTS
from components.artifacts import ADAPTER
from components.errors import InputError, TrainingFailure
from components.launch import run_step
from components.models import load_policy
from components.processes import Job
from components.reward.settings import RewardSettings
from components.rl.settings import PtxSettings
from components.settings import Compute, Lora, Optimizer, Training, VllmSamplerSettings
from components.sft.settings import SFTSettings
from tiny_models import tiny_rl
from vllm_server import VllmServer

pytestmark = pytest.mark.tried(
    "two processes equal one: DDP and ZeRO 1 to 3; a rank that dies; resuming",
    against="torchrun with gloo, real; DeepSpeed, real; no GPU",
)

ROOT, TOGETHER = Path(__file__).parents[2], Path(__file__).with_name("together.py")
DIVIDED: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "zero1": {"strategy": "zero1"},
    "zero2": {"strategy": "zero2"},
    "zero3": {"strategy": "zero3"},
    "zero2-offload": {"strategy": "zero2", "offload": True},
    "zero3-offload": {"strategy": "zero3", "offload": True},
}
LIMIT_S = 2400


def together(jobs: Sequence[Job], folder: Path) -> None:
    """Run the jobs in two processes."""
    (folder / "jobs.json").write_text(json.dumps([job.written() for job in jobs]), "utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [*torchrun, "--nproc-per-node=2", str(TOGETHER), str(folder / "jobs.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def alone(job: Job) -> None:
    """Run the job here, in one process."""
    run_step(job.step, job.settings, job.paths, metrics_file=job.metrics_file, task=job.task)


def rows(job: Job) -> list[dict[str, float]]:
    """metrics.jsonl without times, speeds and what the sampler's own clock says."""
    lines = (job.metrics_file.parent / "metrics.jsonl").read_text("utf-8").splitlines()
    kept = [json.loads(line) for line in lines]
    return [{n: v for n, v in row.items() if n != "time" and not n.startswith("perf/")} for row in kept]


def weights(job: Job) -> dict[str, torch.Tensor]:
    """What the job's model folder holds."""
    model = job.paths["model"]
    assert model is not None
    return load_file(model / "model.safetensors")


def assert_same(one: Job, two: Job, tolerance: float = 2e-5) -> None:
    """The numbers of every update, and the weights, are the same but for rounding."""
    for alone_row, shared_row in zip(rows(one), rows(two), strict=True):
        assert alone_row.keys() == shared_row.keys()
        assert shared_row == pytest.approx(alone_row, rel=1e-3, abs=1e-4)
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=tolerance)


def held(job: Job) -> list[dict[str, Any]]:
    """What each of the two processes held."""
    found = [json.loads((job.metrics_file.parent / f"held-{rank}.json").read_text("utf-8")) for rank in (0, 1)]
    return [row for rows in found for row in rows]


def gathered(job: Job) -> list[dict[str, int]]:
    """The most elements that each of the two processes had of divided weights at once, by what it was doing."""
    return [json.loads((job.metrics_file.parent / f"gathered-{rank}.json").read_text("utf-8")) for rank in (0, 1)]


def a_layer(policy: Path, networks: int = 1) -> float:
    """Elements of a block and of each network's embeddings: what may be there at once, a fraction of what there is.

    The output layer, which is the embeddings here, is used throughout a pass; embeddings that are trained stay until
    the backward pass is over. A tenth of a block, at this size, are its adapters, and as much is a critic's head.
    """
    model = load_policy(policy)
    embeddings, block = (sum(p.numel() for p in part.parameters()) for part in (model.lm_head, model.model.layers[0]))
    limit = networks * embeddings + 1.3 * block
    assert limit < 0.8 * networks * model.num_parameters()
    return limit


def job_in(folder: Path, step: str, settings: Any, **paths: Path | None) -> Job:
    """A job whose model and metrics lie in the folder."""
    plain = settings.model_dump(mode="json", exclude_none=True)
    return Job(step, plain, {**paths, "model": folder / "model"}, folder / "metrics" / "metrics.json", step)


def sft(accumulation: int, compute: Compute, **fields: Any) -> SFTSettings:
    """24 rows in 5 micro-batches: the last update of an epoch has one, which two processes cannot share."""
    training = Training(
        epochs=2, batch_tokens=96, max_length=64, accumulation=accumulation, eval_every=2, compute=compute,
        optimizer=Optimizer(lr=0.01, schedule="cosine", warmup=0.1, max_grad_norm=0.5, weight_decay=0.1),
    )  # fmt: skip
    return SFTSettings(training=training, **fields)


def two(**fields: Any) -> Compute:
    """Two processes."""
    return Compute(dtype="fp32", processes=2, **fields)


ONE = Compute(dtype="fp32")


@pytest.fixture(scope="module")
def sft_jobs(tmp_path_factory: pytest.TempPathFactory, data_folder: Path, policy_folder: Path) -> dict[str, Job]:
    folder = tmp_path_factory.mktemp("sft")
    inputs = {"data": data_folder, "base": policy_folder}
    jobs = {name: job_in(folder / name, "sft", sft(1, two(**fields)), **inputs) for name, fields in DIVIDED.items()}
    jobs["lora"] = job_in(folder / "lora", "sft", sft(1, two(strategy="zero3"), lora=Lora(rank=2)), **inputs)
    less = two(strategy="zero3", gradient_checkpointing=True)
    jobs["checkpointing"] = job_in(folder / "checkpointing", "sft", sft(1, less), **inputs)
    jobs["both"] = job_in(folder / "both", "sft", sft(1, less, lora=Lora(rank=2)), **inputs)
    narrow = two(strategy="zero3").model_copy(update={"dtype": "bf16"})
    jobs["bf16"] = job_in(folder / "bf16", "sft", sft(1, narrow), **inputs)
    together(list(jobs.values()), folder)
    jobs["one"] = job_in(folder / "one", "sft", sft(2, ONE), **inputs)
    jobs["one-lora"] = job_in(folder / "one-lora", "sft", sft(2, ONE, lora=Lora(rank=2)), **inputs)
    jobs["one-bf16"] = job_in(folder / "one-bf16", "sft", sft(2, Compute(dtype="bf16")), **inputs)
    for name in ("one", "one-lora", "one-bf16"):
        alone(jobs[name])
    return jobs


@pytest.mark.parametrize("name", DIVIDED)
def test_sft_in_two_processes_is_sft_in_one_with_twice_the_accumulation(sft_jobs: dict[str, Job], name: str) -> None:
    assert len(rows(sft_jobs["one"])) == 2 * 3  # 5 micro-batches an epoch, 2 an update, the last one alone
    assert_same(sft_jobs["one"], sft_jobs[name])


@pytest.mark.parametrize("name", ["lora", "both"])
def test_adapters_train_alike_where_the_weights_below_them_lie_in_parts(sft_jobs: dict[str, Job], name: str) -> None:
    assert_same(sft_jobs["one-lora"], sft_jobs[name])


def test_activations_are_computed_again_where_weights_lie_in_parts(sft_jobs: dict[str, Job]) -> None:
    assert_same(sft_jobs["one"], sft_jobs["checkpointing"])


def test_bf16_computes_in_bf16_where_weights_lie_in_parts(sft_jobs: dict[str, Job]) -> None:
    """The same losses as in one process, to what bfloat16 is good for; others than in float32."""
    one, shared, wide = ([row["loss/train"] for row in rows(sft_jobs[name])] for name in ("one-bf16", "bf16", "one"))
    assert shared == pytest.approx(one, rel=1e-2)
    assert abs(shared[0] - wide[0]) > 10 * abs(shared[0] - one[0])


@pytest.mark.parametrize("name", ["zero3", "zero3-offload", "lora", "checkpointing", "both"])
def test_no_process_ever_has_more_than_a_layer_of_divided_weights(
    sft_jobs: dict[str, Job], policy_folder: Path, name: str
) -> None:
    """Loading, evaluation, training and saving."""
    limit = a_layer(policy_folder)
    for found in gathered(sft_jobs[name]):
        assert set(found) == {"loading", "otherwise"} and all(0 < most < limit for most in found.values())


@pytest.mark.parametrize("name", DIVIDED)
def test_what_is_said_to_be_divided_really_is(sft_jobs: dict[str, Job], name: str) -> None:
    found = held(sft_jobs[name])
    assert [(row["rank"], row["size"]) for row in found] == [(0, 2), (1, 2)]
    if name == "ddp":
        assert {row["engine"] for row in found} == {"Replica"}
        return
    stage = int(name[4])
    assert {row["stage"] for row in found} == {stage}
    for row in found:
        assert row["states"] == pytest.approx(0.5, abs=0.02)
        assert row["weights"] == (0 if stage == 3 else 1)
        assert row["divides_gradients"] == (stage >= 2)


def ppo_lag(compute: Compute, **fields: Any) -> Any:
    """Five rollouts of 8 rows in two updates each, in micro-batches of one row and of three."""
    given: dict[str, Any] = {"micro_batch_size": 1, "minibatch_size": 5, "compute": compute, "checkpoint_every": 0}
    return tiny_rl("ppo_lag", "fp32", **(given | fields))


@pytest.fixture(scope="module")
def rl_inputs(data_folder: Path, policy_folder: Path, reward_folder: Path, cost_folder: Path) -> dict[str, Path]:
    return {"data": data_folder, "policy": policy_folder, "reward": reward_folder, "cost": cost_folder}


@pytest.fixture(scope="module")
def server(policy_folder: Path) -> Iterator[VllmServer]:
    with pytest.MonkeyPatch.context() as patch, VllmServer(policy_folder).running() as made:
        for variable in ("NO_PROXY", "no_proxy"):
            patch.setenv(variable, "127.0.0.1")
        yield made


@pytest.fixture(scope="module")
def rl_jobs(
    tmp_path_factory: pytest.TempPathFactory,
    rl_inputs: dict[str, Path],
    adapted_reward: Path,
    adapted_cost: Path,
    server: VllmServer,
) -> dict[str, Job]:
    folder, guests = tmp_path_factory.mktemp("rl"), rl_inputs | {"reward": adapted_reward, "cost": adapted_cost}
    served = {"sampler": VllmSamplerSettings(url=server.url, weights=str(folder / "weights"))}
    ptx = {"ptx": PtxSettings(coef=1.0, batch_size=3)}
    others = {"rloo": tiny_rl("rloo", "fp32", compute=two()), "dpo": tiny_rl("dpo", "fp32", compute=two())}
    jobs = {name: job_in(folder / name, "rl", ppo_lag(two(**given)), **rl_inputs) for name, given in DIVIDED.items()}
    jobs |= {f"ptx-{name}": job_in(folder / f"ptx-{name}", "rl", ppo_lag(two(strategy=name), **ptx), **rl_inputs)
             for name in ("ddp", "zero1", "zero3")}  # fmt: skip
    jobs |= {name: job_in(folder / name, "rl", settings, **rl_inputs) for name, settings in others.items()}
    lora = {"lora": Lora(rank=2), "share_backbone": True}
    jobs["lora"] = job_in(folder / "lora", "rl", ppo_lag(two(strategy="zero3"), **lora), **guests)
    less = two(strategy="zero3", gradient_checkpointing=True)
    jobs["served"] = job_in(folder / "served", "rl", ppo_lag(less, **lora, **served), **guests)
    together(list(jobs.values()), folder)
    singles = {
        "one": ppo_lag(ONE),
        "one-ptx": ppo_lag(ONE, **ptx),
        "one-lora": ppo_lag(ONE, **lora),
        "one-served": ppo_lag(ONE, **lora, **served),
        "one-rloo": tiny_rl("rloo", "fp32"),
        "one-dpo": tiny_rl("dpo", "fp32"),
    }
    for name, settings in singles.items():
        jobs[name] = job_in(folder / name, "rl", settings, **(guests if settings.share_backbone else rl_inputs))
        alone(jobs[name])
    return jobs


@pytest.mark.parametrize("name", DIVIDED)
def test_ppo_lag_in_two_processes_is_ppo_lag_in_one(rl_jobs: dict[str, Job], name: str) -> None:
    assert_same(rl_jobs["one"], rl_jobs[name], 1e-4)


def test_lambda_moves_by_the_cost_of_both_processes(rl_jobs: dict[str, Job]) -> None:
    """Each process scores half of the rows: lambda would move otherwise if one went by its own."""
    one, shared = ([row["cost/lambda"] for row in rows(rl_jobs[name])] for name in ("one", "zero2"))
    assert len(set(one)) == len(one) and shared == pytest.approx(one, rel=1e-5)
    means = [[row["cost/window_mean"], row["rollout/cost"]] for row in rows(rl_jobs["zero2"])]
    assert means[0][0] == pytest.approx(means[0][1], abs=1e-6)  # the first window is the first rollout, all of it


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero3"])
def test_the_loss_mixed_in_is_shared_too(rl_jobs: dict[str, Job], name: str) -> None:
    assert_same(rl_jobs["one-ptx"], rl_jobs[f"ptx-{name}"], 1e-4)


@pytest.mark.parametrize("name", ["rloo", "dpo", "lora", "served"])
def test_other_algorithms_adapters_and_samplers_are_the_same_too(rl_jobs: dict[str, Job], name: str) -> None:
    assert_same(rl_jobs[f"one-{name}"], rl_jobs[name], 1e-4)


@pytest.mark.parametrize("name", ["zero3", "zero3-offload", "lora", "served"])
def test_only_our_own_decoder_has_the_whole_policy_of_divided_weights(
    rl_jobs: dict[str, Job], policy_folder: Path, name: str
) -> None:
    """Publishing, scoring by guests, the reference, the read, updates and saving never have more than a layer."""
    limit = a_layer(policy_folder, 3 if name.startswith("zero3") else 1)
    model = load_policy(policy_folder).num_parameters()
    for found in gathered(rl_jobs[name]):
        sampling = found.pop("sampling", 0)
        assert sampling >= model if name != "served" else not sampling
        assert set(found) == {"loading", "otherwise"} and all(0 < most < limit for most in found.values())


@pytest.mark.parametrize("name", DIVIDED)
def test_critics_are_divided_with_the_policy(rl_jobs: dict[str, Job], name: str) -> None:
    assert [(row["rank"], row["size"]) for row in held(rl_jobs[name])] == [(0, 2), (1, 2)]
    assert all(row.get("states", 0.5) == pytest.approx(0.5, abs=0.02) for row in held(rl_jobs[name]))


def test_reward_and_cost_models_and_members_are_the_same(
    tmp_path: Path, data_folder: Path, policy_folder: Path
) -> None:
    def settings(accumulation: int, compute: Compute, **fields: Any) -> RewardSettings:
        training = Training(
            epochs=2, batch_tokens=160, max_length=64, accumulation=accumulation, compute=compute,
            optimizer=Optimizer(lr=0.01, schedule="constant", warmup=0.0),
        )  # fmt: skip
        return RewardSettings(training=training, **fields)

    inputs = {"data": data_folder, "sft": policy_folder}
    kinds: dict[str, dict[str, Any]] = {
        "reward": {"members": 2},
        "cost": {"kind": "cost", "dimension": "harmless"},
        "adapted": {"lora": Lora(rank=2)},
    }
    given = {"reward": two(strategy="zero3"), "cost": two(), "adapted": two(strategy="zero3")}
    chosen = {kind: settings(1, given[kind], **kinds[kind]) for kind in kinds}
    shared = {kind: job_in(tmp_path / kind, "reward", chosen[kind], **inputs) for kind in kinds}
    together(list(shared.values()), tmp_path)
    for kind, fields in kinds.items():
        one = job_in(tmp_path / f"one-{kind}", "reward", settings(2, ONE, **fields), **inputs)
        alone(one)
        assert_same(one, shared[kind])
        metrics = [json.loads(job.metrics_file.read_text("utf-8")) for job in (one, shared[kind])]
        assert metrics[1] == pytest.approx(metrics[0], rel=1e-3, abs=1e-4)
    first, second = (Path(str(job.paths["model"])) / ADAPTER for job in (one, shared["adapted"]))
    assert (first / CONFIG).read_text("utf-8") == (second / CONFIG).read_text("utf-8")
    expected, found = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert expected.keys() == found.keys()
    assert all(torch.allclose(expected[name], found[name], rtol=1e-3, atol=2e-5) for name in expected)
    limit = a_layer(policy_folder)
    for kind in ("reward", "adapted"):  # normalised, compared and saved
        assert all(0 < most < limit for row in gathered(shared[kind]) for most in row.values())


class Broken(Exception):
    """What ends a run in the middle."""


def cut_short(job: Job, updates: int, patch: pytest.MonkeyPatch) -> None:
    """Run the job alone until so many checkpoints are written, and no further."""
    from components.checkpoints import Checkpoints

    written, save = list[int](), Checkpoints.save

    def saved(self: Checkpoints, update: int, *given: Any) -> None:
        save(self, update, *given)
        written.append(update)
        if len(written) == updates:
            raise Broken

    with patch.context() as patched:
        patched.setattr(Checkpoints, "save", saved)
        with pytest.raises(Broken):
            alone(job)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_two_processes_continue_what_one_began(
    rl_jobs: dict[str, Job],
    rl_inputs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
) -> None:
    monkeypatch.setenv("PLUMBLINE_CHECKPOINTS", str(tmp_path / "checkpoints"))
    begun = job_in(tmp_path / "a", "rl", ppo_lag(ONE, checkpoint_every=1), **rl_inputs)
    cut_short(begun, 2, monkeypatch)
    shared = job_in(tmp_path / "b", "rl", ppo_lag(two(strategy=strategy), checkpoint_every=1), **rl_inputs)
    together([shared], tmp_path)
    assert_same(rl_jobs["one"], shared, 1e-4)
    assert not list((tmp_path / "checkpoints").iterdir())


def start(job: Job, folder: Path, **environment: str) -> "subprocess.Popen[str]":
    """The job as `python -m components` runs it: in a process that starts two."""
    import yaml

    (folder / "settings.yaml").write_text(yaml.safe_dump(job.settings), "utf-8")
    paths = [word for name, path in job.paths.items() if path for word in (f"--{name}", str(path))]
    command = [sys.executable, "-m", "components", job.step, "--settings", str(folder / "settings.yaml"), *paths]
    given = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """The processes below a process, in Linux's order."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split()
    return [int(child) for child in found]


def long_job(folder: Path, inputs: Mapping[str, Path], strategy: str = "ddp") -> Job:
    """SFT that takes a minute or more."""
    settings = sft(1, two(strategy=strategy))
    training = settings.training.model_copy(update={"epochs": 400, "eval_every": 0})
    return job_in(folder, "sft", settings.model_copy(update={"training": training}), **inputs)


def has_rows(folder: Path, count: int) -> bool:
    file = folder / "model.metrics" / "metrics.jsonl"
    return file.exists() and len(file.read_text("utf-8").splitlines()) >= count


def test_a_process_that_is_killed_ends_the_step_with_a_word_within_a_minute(
    tmp_path: Path, data_folder: Path, policy_folder: Path
) -> None:
    job = long_job(tmp_path, {"data": data_folder, "base": policy_folder})
    started = start(job, tmp_path)
    wait_for(lambda: has_rows(tmp_path, 3))
    (torchrun,) = children(started.pid)
    os.kill(children(torchrun)[1], signal.SIGKILL)
    killed = time.monotonic()
    _, errors = started.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert started.returncode == 1, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: sft: process 2 of 2 ended without a word") and "memory" in last


@pytest.fixture(scope="module")
def ten_rollouts(tmp_path_factory: pytest.TempPathFactory, rl_inputs: dict[str, Path]) -> Job:
    """Ten rollouts of one process that nobody stopped."""
    job = job_in(tmp_path_factory.mktemp("ten"), "rl", ppo_lag(ONE, rollouts=10), **rl_inputs)
    alone(job)
    return job


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_stopped_by_sigterm_and_started_again_two_processes_end_as_if_nothing_had_been(
    tmp_path: Path, rl_inputs: dict[str, Path], ten_rollouts: Job, strategy: str
) -> None:
    job = job_in(tmp_path, "rl", ppo_lag(two(strategy=strategy), rollouts=10), **rl_inputs)
    checkpoints = tmp_path / "checkpoints"
    started = start(job, tmp_path, PLUMBLINE_CHECKPOINTS=str(checkpoints))
    wait_for(lambda: has_rows(tmp_path, 2))
    started.send_signal(signal.SIGTERM)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == 143, errors
    ((checkpoint,),) = ([*work.iterdir()] for work in checkpoints.iterdir())
    assert int(checkpoint.name) >= 4
    again = start(job, tmp_path, PLUMBLINE_CHECKPOINTS=str(checkpoints))
    _, errors = again.communicate(timeout=LIMIT_S)
    assert again.returncode == 0, errors
    left = Job(job.step, job.settings, job.paths, tmp_path / "model.metrics" / "metrics.json", job.task)
    assert_same(ten_rollouts, left, 1e-4)
    assert not list(checkpoints.iterdir())


def test_another_number_of_processes_is_refused_where_updates_would_be_of_another_size(
    tmp_path: Path, data_folder: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLUMBLINE_CHECKPOINTS", str(tmp_path / "checkpoints"))
    inputs = {"data": data_folder, "base": policy_folder}

    def job(accumulation: int) -> Job:
        settings = sft(accumulation, ONE)
        training = settings.training.model_copy(update={"checkpoint_every": 1})
        return job_in(tmp_path / str(accumulation), "sft", settings.model_copy(update={"training": training}), **inputs)

    cut_short(job(2), 2, monkeypatch)
    with pytest.raises(InputError, match="micro_batches_per_update is 2 there and 1 here"):
        alone(job(1))


def test_an_error_of_both_processes_is_one_message(tmp_path: Path, data_folder: Path, policy_folder: Path) -> None:
    settings = sft(1, two()).model_dump(mode="json")
    paths = {"data": tmp_path, "base": policy_folder, "model": tmp_path / "m"}
    job = Job("sft", settings, paths, tmp_path / "x.json", "sft")
    with pytest.raises(InputError, match="not a data folder"):
        run_step(job.step, job.settings, job.paths, metrics_file=job.metrics_file, task="sft")


def test_a_loss_that_is_not_finite_in_one_process_skips_the_update_in_both(
    tmp_path: Path, data_folder: Path, policy_folder: Path
) -> None:
    """A rate at which the weights overflow: every process must give up at the same update, with the same word."""
    settings = sft(1, two(strategy="zero2"))
    wild = Optimizer(lr=1e30, schedule="constant", warmup=0.0, max_skipped=1)
    training = settings.training.model_copy(update={"optimizer": wild, "eval_every": 0})
    inputs = {"data": data_folder, "base": policy_folder}
    job = job_in(tmp_path, "sft", settings.model_copy(update={"training": training}), **inputs)
    with pytest.raises(TrainingFailure, match="skipped for a loss or gradient that is not finite, number 2 in a row"):
        run_step(job.step, job.settings, job.paths, metrics_file=job.metrics_file, task="sft")
