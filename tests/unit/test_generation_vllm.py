"""The vLLM sampler against a server that runs here: what it asks, what it takes, and what it refuses."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from components import endpoint
from components.adapters import merged_tensors
from components.errors import InputError
from components.generation import Samples
from components.generation.vllm import VllmSampler, request_seed
from components.generation.weights import shared_weights
from components.logprobs import response_logprobs
from components.models import load_policy, with_lora
from components.parsing import parse
from components.phases import Phases
from components.ranks import ALONE, Ranks
from components.rl.networks import Networks
from components.rl.settings import RLSettings
from components.rl.sources import build_sampler
from components.settings import Generation, Lora, VllmSamplerSettings
from components.tokens import load_tokenizer
from threaded import in_threads
from tiny_models import tiny_rl
from vllm_server import VllmServer

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
LENGTH, EOS = 4, 1
SECRET = "k3y-of-the-server"
TEMPERATURE = 0.7


@pytest.fixture
def server(policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmServer]:
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "127.0.0.1")
    with VllmServer(policy_folder).running() as made:
        yield made


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds slept between attempts, which pass at once."""
    slept: list[float] = []
    monkeypatch.setattr(endpoint, "time", type("Clock", (), {"sleep": staticmethod(slept.append)}))
    return slept


@pytest.fixture
def policy(policy_folder: Path) -> Any:
    """A policy whose weights are others than those that the server starts with."""
    model = load_policy(policy_folder)
    disturb(model)
    return model


@pytest.fixture
def sampler(server: VllmServer, policy: Any, tmp_path: Path) -> Callable[..., VllmSampler]:
    def made(
        seed: int = 3, generation: dict[str, Any] | None = None, phases: Phases | None = None, **fields: Any
    ) -> VllmSampler:
        given = {"url": server.url, "weights": str(tmp_path / "shared"), "retries": 2} | fields
        sampling = {"max_new_tokens": LENGTH, "max_prompt_tokens": 8, "temperature": TEMPERATURE} | (generation or {})
        return VllmSampler(VllmSamplerSettings(**given), policy, EOS, Generation(**sampling), seed, phases)

    return made


@torch.no_grad()
def disturb(model: Any, size: float = 0.3) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * size)


@torch.no_grad()
def of_policy(policy: Any, prompt: list[int], ids: Tensor) -> Tensor:
    whole = torch.cat([torch.tensor(prompt), ids])[None]
    return response_logprobs(policy, whole, torch.ones_like(whole, dtype=torch.bool), len(ids), TEMPERATURE)[0][0]


def refusal(function: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(InputError) as raised:
        function(*args)
    return str(raised.value)


def test_responses_come_prompt_major_with_the_log_probabilities_of_the_policy(sampler: Any, policy: Any) -> None:
    samples = sampler(concurrency=2).sample(PROMPTS, 3)
    assert samples.ids.shape == samples.mask.shape == samples.logprobs.shape and len(samples.ids) == 9
    for row, prompt in enumerate(prompt for prompt in PROMPTS for _ in range(3)):
        taken = samples.mask[row]
        torch.testing.assert_close(
            samples.logprobs[row][taken], of_policy(policy, prompt, samples.ids[row][taken]), atol=1e-4, rtol=1e-4
        )
        assert (samples.logprobs[row][~taken] == 0).all()
        assert bool(samples.ended[row]) == (int(samples.ids[row][taken][-1]) == EOS)


def test_every_batch_is_sampled_from_the_weights_as_they_are(sampler: Any, server: VllmServer, policy: Any) -> None:
    made = sampler()
    versions = []
    for number in range(3):
        disturb(policy)
        samples = made.sample(PROMPTS[:1])
        expected = of_policy(policy, PROMPTS[0], samples.ids[0][samples.mask[0]])
        torch.testing.assert_close(samples.logprobs[0][samples.mask[0]], expected, atol=1e-4, rtol=1e-4)
        assert server.loaded == number + 1 and made.metrics["sampler/version"] == number
        versions.append(server.version)
    assert len(set(versions)) == 3
    order = [address for address, _ in server.asked if not address.startswith("/v1")]
    update = ["/pause?mode=abort", "/collective_rpc", "/collective_rpc", "/update_weight_version", "/resume"]
    assert order == [*update, "/weight_info"] * 3
    assert not list(Path(made.settings.weights).iterdir())


def test_handing_weights_over_and_sampling_are_timed_apart(sampler: Any, server: VllmServer) -> None:
    phases = Phases(clock=lambda: float(len(server.asked)))  # a second for every request
    samples = sampler(phases=phases).sample(PROMPTS, 2)
    metrics = phases.lap()
    assert metrics["perf/weights_s"] == 5  # the five of an update
    assert metrics["perf/decode_s"] == 1 + len(PROMPTS) + 1  # the comparison, the prompts, the version
    assert metrics["perf/decode_tokens_per_s"] == pytest.approx(int(samples.mask.sum()) / 5)


def test_what_is_asked_leaves_nothing_to_the_servers_defaults(sampler: Any, server: VllmServer) -> None:
    sampler().sample(PROMPTS, 2)
    bodies = [body for body in server.bodies("/v1/completions") if body["n"] == 2]
    assert sorted(body["prompt"] for body in bodies) == sorted(PROMPTS)
    expected = {
        "model": "tiny", "n": 2, "max_tokens": LENGTH, "temperature": TEMPERATURE, "top_p": 1.0, "top_k": 0, "min_p": 0,
        "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "ignore_eos": True, "logprobs": 0,
        "stop_token_ids": [EOS], "return_token_ids": True, "add_special_tokens": False,
    }  # fmt: skip
    for body in bodies:
        assert body == expected | {"prompt": body["prompt"], "seed": body["seed"]}
    assert len({body["seed"] for body in bodies}) == 3


def test_a_sampler_that_goes_on_asks_what_it_would_have_asked(sampler: Any, server: VllmServer) -> None:
    def seeds(made: VllmSampler) -> list[int]:
        server.asked.clear()
        made.sample(PROMPTS, 2)
        return sorted(body["seed"] for body in server.bodies("/v1/completions") if body["n"] == 2)

    first = sampler()
    before = seeds(first)
    state, expected = first.state(), seeds(first)
    again = sampler()
    again.restore(state)
    assert seeds(again) == expected != before
    assert seeds(sampler()) == before
    assert seeds(sampler(seed=4)) != before


def test_seeds_differ_and_leave_room_to_count_up() -> None:
    seeds = {request_seed(seed, number, row) for seed in range(5) for number in range(5) for row in range(40)}
    assert len(seeds) == 1000 and max(seeds) < 2**62 and min(seeds) >= 0


def test_a_server_in_trouble_is_asked_again(sampler: Any, server: VllmServer, waits: list[float]) -> None:
    made = sampler(backoff_s=0.5)
    expected = made.sample(PROMPTS, 2)
    again = sampler(backoff_s=0.5)
    server.failing = {"/v1/completions": [503, 429], "/collective_rpc": [500]}
    assert torch.equal(again.sample(PROMPTS, 2).ids, expected.ids)
    assert len(waits) == 3


def test_the_token_is_sent_and_never_shown(
    sampler: Any, server: VllmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_KEY", SECRET)
    made = sampler(token_env="VLLM_KEY")
    assert set(server.headers) == {f"Bearer {SECRET}"}
    server.failing = {"/pause": [401]}
    message = refusal(made.sample, PROMPTS)
    assert "401" in message and "***" in message and SECRET not in message


def test_an_absent_server_is_one_message(policy: Any, tmp_path: Path) -> None:
    settings = VllmSamplerSettings(url="http://127.0.0.1:9", weights=str(tmp_path), retries=1)
    message = refusal(VllmSampler, settings, policy, EOS, Generation(), 0)
    assert message.startswith("rl.sampler (http://127.0.0.1:9)/v1/models failed 2 times")
    assert "VLLM_SERVER_DEV_MODE=1" in message and "ConnectError" in message


def test_a_server_without_its_development_paths_is_told_how_to_start(sampler: Any, server: VllmServer) -> None:
    made = sampler()
    server.failing = {"/pause": [404]}
    message = refusal(made.sample, PROMPTS)
    assert "/pause?mode=abort answered status 404" in message and "VLLM_SERVER_DEV_MODE=1" in message


def test_log_probabilities_from_before_the_temperature_are_refused(sampler: Any, server: VllmServer) -> None:
    def raw(body: Any) -> Any:
        for choice in body["choices"]:
            choice["logprobs"]["token_logprobs"] = [-5.0]
        return body

    made = sampler()
    server.changed = {"/v1/completions": raw}
    message = refusal(made.sample, PROMPTS)
    assert "--logprobs-mode processed_logprobs" in message and "-5" in message


def test_a_server_that_computes_another_model_is_refused(sampler: Any, server: VllmServer) -> None:
    made = sampler()
    server.load = lambda folder: disturb(server.model, 0.0)  # type: ignore[method-assign]  # keeps its own weights
    message = refusal(made.sample, PROMPTS)
    assert "nats per token of a prompt" in message and "folder of the policy" in message


def test_weights_that_another_run_replaced_are_noticed(sampler: Any, server: VllmServer) -> None:
    made = sampler()
    server.changed = {"/weight_info": lambda body: {"weight_version": "another-1"}}
    message = refusal(made.sample, PROMPTS)
    assert "'another-1'" in message and "another run" in message


@pytest.mark.parametrize(
    ("models", "part"),
    [
        ({"data": []}, "serves 0 models"),
        ({"data": [{"id": "a"}, {"id": "b"}]}, "serves 2 models"),
        (["what"], "serves 0 models"),
        ({"data": [{"id": "a", "max_model_len": 11}]}, "holds 11 tokens"),
    ],
)
def test_a_server_with_other_models_is_refused(models: Any, part: str, sampler: Any, server: VllmServer) -> None:
    server.changed = {"/v1/models": lambda _: models}
    assert part in refusal(sampler)


def test_adapters_beside_the_model_do_not_matter(sampler: Any, server: VllmServer) -> None:
    listed = [{"id": "tiny", "parent": None}, {"id": "adapter", "parent": "tiny"}]
    server.changed = {"/v1/models": lambda _: {"data": listed}}
    assert len(sampler().sample(PROMPTS).ids) == 3


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda c: c.pop("token_ids"), "token_ids None"),
        (lambda c: c.update(token_ids=[10**6] * LENGTH), "the policy's vocabulary"),
        (lambda c: c.update(token_ids=[-1]), "the policy's vocabulary"),
        (lambda c: c.update(token_ids=[]), "0 tokens"),
        (lambda c: c.update(token_ids=[5] * (LENGTH + 1)), f"1 to {LENGTH}"),
        (lambda c: c.update(token_ids=[5], logprobs={"token_logprobs": [-1.0]}), "response of 1 tokens"),
        (lambda c: c.update(token_ids=[EOS, 5, 5, 5], finish_reason="length"), "end at the first"),
        (lambda c: c.update(token_ids=[5, 5, 5, EOS], finish_reason="length"), "whose last is 1"),
        (lambda c: c.update(token_ids=[5, 5, 5, 5], finish_reason="stop"), "whose last is 5"),
        (lambda c: c.update(finish_reason="abort"), "no other user"),
        (lambda c: c.update(logprobs=None), "token_logprobs None"),
        (lambda c: c.update(logprobs={"token_logprobs": [-1.0]}), "finite numbers"),
        (lambda c: c.update(logprobs={"token_logprobs": [float("nan")] * LENGTH}), "finite numbers"),
        (lambda c: c.update(logprobs={"token_logprobs": [0.5] * LENGTH}), "at most 0"),
        (lambda c: c.update(index=7), "choices [7]"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(
    spoil: Callable[[dict[str, Any]], Any], part: str, sampler: Any, server: VllmServer
) -> None:
    made = sampler()
    fitting = {"index": 0, "token_ids": [5] * LENGTH, "finish_reason": "length"}

    def changed(body: Any) -> Any:
        if "prompt_logprobs" in body["choices"][0]:
            return body
        choice = fitting | {"logprobs": {"token_logprobs": [-1.0] * LENGTH}}
        spoil(choice)
        return {"choices": [choice]}

    server.changed = {"/v1/completions": changed}
    message = refusal(made.sample, PROMPTS[:1])
    assert message.startswith("rl.sampler (") and part in message


@pytest.mark.parametrize("answer", [{}, [], {"choices": [1]}, {"choices": []}])
def test_an_answer_of_another_form_is_refused(answer: Any, sampler: Any, server: VllmServer) -> None:
    made = sampler()
    server.changed = {"/v1/completions": lambda _: answer}
    assert "gave back" in refusal(made.sample, PROMPTS)


def test_a_server_that_a_killed_run_left_paused_is_used_again(sampler: Any, server: VllmServer) -> None:
    server.paused = True
    assert len(sampler().sample(PROMPTS).ids) == 3 and not server.paused


def test_of_several_processes_the_first_alone_asks_and_all_have_the_samples(
    server: VllmServer, policy: Any, tmp_path: Path
) -> None:
    settings = VllmSamplerSettings(url=server.url, weights=str(tmp_path))

    def sampled(ranks: Ranks) -> Samples:
        generation = Generation(max_new_tokens=LENGTH, max_prompt_tokens=8, temperature=TEMPERATURE)
        return VllmSampler(settings, policy, EOS, generation, 3, ranks=ranks).sample(PROMPTS, 2)

    alone, *shared = sampled(ALONE), *in_threads(2, sampled)
    assert server.loaded == 2 and len(shared) == 2
    for samples in shared:
        assert torch.equal(samples.ids, alone.ids) and torch.equal(samples.logprobs, alone.logprobs)


def test_a_folder_that_cannot_be_written_is_named(sampler: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(sampler(weights=str(tmp_path / "file")).sample, PROMPTS)
    assert message.startswith("rl.sampler.weights is") and "same path" in message


def test_adapters_are_merged_on_their_way_and_stay_where_they_are(policy: Any, tmp_path: Path) -> None:
    tuned = with_lora(policy, Lora(rank=2))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    before = {name: parameter.clone() for name, parameter in tuned.named_parameters()}
    given = tuned, merged_tensors(tuned), str(tmp_path), "key"
    with shared_weights(*given) as folder, safe_open(folder / "model.safetensors", "pt") as file:
        written = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert not [name for name in written if "lora" in name]
    whole = deepcopy(tuned).merge_and_unload().state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in written.items())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(written[name], before["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"])
    after = dict(tuned.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_tied_head_is_written_beside_the_embeddings(policy: Any, tmp_path: Path) -> None:
    assert policy.config.tie_word_embeddings
    given = policy, merged_tensors(policy), str(tmp_path), "key"
    with shared_weights(*given) as folder, safe_open(folder / "head.safetensors", "pt") as file:
        assert list(file.keys()) == ["lm_head.weight"]
        assert torch.equal(file.get_tensor("lm_head.weight"), policy.model.embed_tokens.weight)
        assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("sampler", "part"),
    [
        ({"kind": "vllm"}, "rl.sampler.url is missing"),
        ({"kind": "vllm", "url": "http://a"}, "rl.sampler.weights is missing"),
        ({"kind": "vllm", "url": "a:8000", "weights": "w"}, "rl.sampler.url is no web address"),
        ({"kind": "vllm", "url": "http://me:secret@a", "weights": "w"}, "token_env"),
        ({"kind": "native", "url": "http://a"}, "rl.sampler.url is unknown"),
        ({"kind": "sglang"}, "'native', 'vllm'"),
    ],
)
def test_settings_that_name_no_usable_sampler_are_refused(sampler: dict[str, Any], part: str) -> None:
    assert part in refusal(lambda: parse(RLSettings, {"sampler": sampler}, prefix=("rl",)))


def test_settings_choose_the_sampler(server: VllmServer, policy_folder: Path, tmp_path: Path) -> None:
    tokenizer, networks = load_tokenizer(policy_folder), Networks(load_policy(policy_folder))
    chosen = VllmSamplerSettings(url=server.url, weights=str(tmp_path))
    made = build_sampler(tiny_rl("ppo", "fp32", sampler=chosen), networks, tokenizer)
    assert isinstance(made, VllmSampler) and not made.on_policy
    assert build_sampler(tiny_rl("ppo", "fp32"), networks, tokenizer).on_policy
