"""A real vLLM server as the sampler of a tiny policy. `make sampler` starts it; elsewhere these tests are skipped."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import tiny_models
from components.errors import InputError
from components.generation import Samples
from components.generation.vllm import VllmSampler
from components.logprobs import response_logprobs
from components.models import load_policy
from components.rl import loop
from components.rl import step as rl_step
from components.rl.step import run
from components.settings import Generation, VllmSamplerSettings
from components.tokens import load_tokenizer, pad
from tiny_models import make_inputs, tiny_rl

PYTHON = os.environ.get("PLUMBLINE_VLLM", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="PLUMBLINE_VLLM names no Python with vLLM; `make sampler` sets one up and runs these tests"
)

SHAPE = (64, 2, 2, 1, 128)
"""Heads of 32: vLLM on CPU has no smaller ones."""
TEMPERATURE, BLOCK = 0.7, 32
START_S = 900.0
EXACT = 1e-4
"""Nats by which two float32 engines may differ."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data, policy, reward and cost model of a tiny run, as vLLM can serve it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_models, "TINY", SHAPE)
        return make_inputs(tmp_path_factory.mktemp("vllm"))


@contextmanager
def serving(policy: Path, log: Path) -> Iterator[str]:
    """The address of a vLLM server of `policy`, started as components/generation/README.md says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(policy), "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--logprobs-mode", "processed_logprobs", "--generation-config",
        "vllm", "--load-format", "dummy", "--hf-overrides", '{"tie_word_embeddings": false}', "--enforce-eager",
        "--block-size", str(BLOCK),
    ]  # fmt: skip
    switches = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | switches
    environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server answers there. Fails with the end of its log when it ends or takes too long."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(address, timeout=5).is_success:
                return
        except httpx.RequestError:
            time.sleep(1)
    pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")


@pytest.fixture(scope="module")
def server(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("NO_PROXY", "no_proxy"):
            patch.setenv(variable, "127.0.0.1")
        with serving(inputs["policy"], tmp_path_factory.mktemp("server") / "log") as address:
            yield address


@pytest.fixture
def settings(server: str, tmp_path: Path) -> VllmSamplerSettings:
    return VllmSamplerSettings(url=server, weights=str(tmp_path / "shared"), retries=1)


def sampler_of(settings: VllmSamplerSettings, policy: Any, **generation: Any) -> VllmSampler:
    given = {"max_new_tokens": 12, "max_prompt_tokens": 100, "temperature": TEMPERATURE} | generation
    return VllmSampler(settings, policy, 1, Generation(**given), seed=3)


@torch.no_grad()
def gap(policy: Any, prompts: list[list[int]], samples: Samples, k: int) -> float:
    """The largest difference of the sampler's log-probabilities from the policy's as it is now."""
    ids, mask = pad([prompt for prompt in prompts for _ in range(k)], 0, side="left")
    whole, real = torch.cat([ids, samples.ids], 1), torch.cat([mask, samples.mask], 1)
    logprobs = response_logprobs(policy, whole, real, samples.ids.shape[1], TEMPERATURE)[0]
    return float((logprobs - samples.logprobs)[samples.mask].abs().max())


@torch.no_grad()
def disturb(policy: Any, part: str = "", size: float = 0.1) -> None:
    for name, parameter in policy.named_parameters():
        if part in name:
            parameter.add_(torch.randn_like(parameter) * size)


@pytest.mark.parametrize("part", ["embed_tokens", "q_proj", "down_proj", "model.norm", ""])
def test_after_an_update_the_server_has_the_new_weights_and_no_trace_of_the_old(
    part: str, inputs: dict[str, Path], settings: VllmSamplerSettings
) -> None:
    torch.manual_seed(5)
    policy = load_policy(inputs["policy"])
    prompts = [torch.randint(5, 290, (length,)).tolist() for length in (3, 40, 99)]  # up to three cached blocks
    sampler = sampler_of(settings, policy)
    assert gap(policy, prompts, sampler.sample(prompts, 4), 4) < EXACT
    disturb(policy, part)
    samples = sampler.sample(prompts, 4)
    assert gap(policy, prompts, samples, 4) < EXACT
    disturb(policy, part)
    assert gap(policy, prompts, samples, 4) > 0.05  # what an update that never arrived would look like
    assert not list(Path(settings.weights).iterdir())


def test_the_cache_that_an_update_empties_is_used_within_a_batch(
    inputs: dict[str, Path], settings: VllmSamplerSettings
) -> None:
    def hits() -> float:
        lines = httpx.get(f"{settings.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))

    sampler, before = sampler_of(settings, load_policy(inputs["policy"])), hits()
    sampler.sample([list(range(5, 105))], 4)
    assert hits() > before


def test_responses_end_at_the_end_of_sequence_token_and_include_it(
    inputs: dict[str, Path], settings: VllmSamplerSettings
) -> None:
    policy = load_policy(inputs["policy"])
    sampler = sampler_of(settings, policy, temperature=2.0, max_new_tokens=100, max_prompt_tokens=20)
    samples = sampler.sample([[5, 6, 7], [8, 9]], 32)
    last = samples.ids.gather(1, samples.mask.sum(1, keepdim=True) - 1).squeeze(1)
    assert samples.ended.any() and torch.equal(samples.ended, last == 1)
    assert (samples.mask.sum(1)[~samples.ended] == 100).all()


def test_the_same_batch_of_the_same_weights_is_sampled_again(
    inputs: dict[str, Path], settings: VllmSamplerSettings
) -> None:
    first, again = (sampler_of(settings, load_policy(inputs["policy"])) for _ in range(2))
    prompts = [[5, 6, 7], [8, 9]]
    one, two = (first.sample(prompts, 4).ids.tolist() for _ in range(2))
    again.restore(torch.tensor([1]))
    assert again.sample(prompts, 4).ids.tolist() == two != one


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_rl_learns_from_a_server(
    algorithm: str, inputs: dict[str, Path], settings: VllmSamplerSettings, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    courses: list[Any] = []

    def recorded(*given: Any) -> Any:
        courses.append(loop.train(*given))
        return courses[-1]

    monkeypatch.setattr(rl_step, "train", recorded)
    run(tiny_rl(algorithm, "fp32", sampler=settings), **inputs, model=tmp_path / "model")
    rows = [row.metrics for row in courses[0].history]
    assert [row["sampler/version"] for row in rows] == list(range(tiny_models.ROLLOUTS))
    for row in rows:
        assert row["sampler/logprob_gap_max"] < EXACT and row["sampler/effective"] == pytest.approx(1, abs=1e-3)
        assert row["sampler/weight"] == pytest.approx(1, abs=1e-3)
    assert abs(rows[-1]["rollout/kl_k3"]) > 1e-3 > abs(rows[0]["rollout/kl_k3"])  # the weights did move


@pytest.mark.parametrize("shape", [(64, 1, 2, 1, 128), (128, 2, 4, 1, 128)], ids=["shallower", "wider"])
def test_a_policy_of_another_architecture_is_refused(
    shape: tuple[int, ...], inputs: dict[str, Path], settings: VllmSamplerSettings, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Comes last: a server that could not load weights is none to go on with."""
    monkeypatch.setattr(tiny_models, "TINY", shape)
    other = load_policy(tiny_models.make_policy(tmp_path / "other", load_tokenizer(inputs["policy"])))
    with pytest.raises(InputError, match="architecture"):
        sampler_of(settings, other).sample([[5, 6, 7]])
