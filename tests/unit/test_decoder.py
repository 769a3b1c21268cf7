"""The fast decoder: its forward pass is Hugging Face's, and slots, neighbours and adapters change no response."""

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from components.generation import Samples, native, respond, slots
from components.generation.families import is_known
from components.generation.linear import Linear
from components.generation.llama import Llama
from components.generation.native import NativeSampler
from components.generation.transcript import Transcript
from components.logprobs import response_logprobs
from components.models import autocast, with_lora
from components.phases import Phases
from components.settings import Generation, Lora
from components.tokens import pad

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads": ("Llama", {}),
    "one head per head": ("Llama", {"num_key_value_heads": 4}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "other activation": ("Llama", {"hidden_act": "gelu"}),
    "other epsilon": ("Llama", {"rms_norm_eps": 0.5}),
    "wide heads": ("Llama", {"head_dim": 16}),
    "rope linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}}),
    "rope llama3": ("Llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}}),
    "rope yarn": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}
UNKNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    "sliding mistral": ("Mistral", {"sliding_window": 4}),
    "sliding qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "rope of varying frequency": (
        "Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}},
    ),
    "gemma": ("Gemma", {"head_dim": 8}),
}
PROMPTS = [[10, 11, 12, 13, 14, 15, 16], [20, 21], [30], [40, 41, 42, 43], [50, 51, 52]]
NEVER = 96  # beyond the vocabulary


def build(family: str, fields: dict[str, Any]) -> Any:
    """A random model whose every weight matters, biases and norms included."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SHAPE | fields))
    model = getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("Llama", {})


def sampled(
    model: Any, prompts: list[list[int]] = PROMPTS, k: int = 1, eos: int = NEVER, seed: int = 0, **fields: Any
) -> Samples:
    generation = Generation(**({"max_new_tokens": 12} | fields))
    return NativeSampler(model, eos, generation, seed).sample(prompts, k)


def responses(samples: Samples) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(samples.ids, samples.mask, strict=True)]


def trainers(model: Any, samples: Samples, k: int = 1) -> Tensor:
    """The trainer's log-probabilities (B, R) of `samples` from PROMPTS."""
    prompt_ids, prompt_mask = pad([prompt for prompt in PROMPTS for _ in range(k)], 0, side="left")
    ids = torch.cat([prompt_ids, samples.ids.masked_fill(~samples.mask, 0)], 1)
    mask = torch.cat([prompt_mask, samples.mask], 1)
    with torch.no_grad():
        return response_logprobs(model, ids, mask, samples.ids.shape[1])[0]


def gap(model: Any, samples: Samples, k: int = 1) -> Tensor:
    return (trainers(model, samples, k) - samples.logprobs)[samples.mask].abs()


@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_the_fast_forward_pass_gives_hugging_face_s_logits(name: str) -> None:
    model = build(*KNOWN[name])
    assert is_known(model)
    ids = torch.randint(0, 96, (3, 20), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([9, 4, 9])
    fast = Llama(model, 20, torch.float32)
    logits, keys_values = fast.prefill(ids[:, :9], lengths)
    expected = model(ids).logits
    torch.testing.assert_close(logits, expected[torch.arange(3), lengths - 1], atol=2e-4, rtol=1e-4)
    cache = fast.empty_cache(3)
    for slot, length in enumerate(lengths.tolist()):
        cache.fill(slot, keys_values[:, slot, :length])
    for step in range(11):
        now = lengths + step
        logits = fast.step(ids[torch.arange(3), now], now, cache)
        torch.testing.assert_close(logits, expected[torch.arange(3), now], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.8}, {"temperature": 0}])
@pytest.mark.parametrize("name", ["grouped heads", "biased", "rope yarn", "mistral", "qwen2", "qwen3"])
def test_both_ways_of_decoding_give_the_same_responses(
    name: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(*KNOWN[name])
    eos = responses(sampled(model, k=2, **fields))[3][4]
    fast = sampled(model, k=2, eos=eos, batch_size=4, **fields)
    monkeypatch.setattr(native, "is_known", lambda model: False)
    slow = sampled(model, k=2, eos=eos, batch_size=4, **fields)
    assert responses(fast) == responses(slow)
    assert torch.equal(fast.ended, slow.ended) and fast.ended.any()
    assert torch.equal(fast.mask, slow.mask) and torch.equal(fast.ids, slow.ids)
    torch.testing.assert_close(fast.logprobs, slow.logprobs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_model_is_decoded_by_generate_and_the_trainer_agrees(name: str) -> None:
    model = build(*UNKNOWN[name])
    assert not is_known(model)
    samples = sampled(model, k=2, batch_size=4)
    assert gap(model, samples, k=2).max() < 5e-4
    alone = [responses(sampled(model, [prompt], temperature=0))[0] for prompt in PROMPTS]
    assert responses(sampled(model, temperature=0)) == alone


def test_an_unknown_architecture_is_named_once(caplog: pytest.LogCaptureFixture, llama: Any) -> None:
    native._say_unknown.cache_clear()
    model = build(*UNKNOWN["gpt2"])
    with caplog.at_level(logging.WARNING, logger=native.__name__):
        for _ in range(3):
            sampled(model)
        sampled(llama)
    (record,) = [record for record in caplog.records if record.name == native.__name__]
    assert "GPT2LMHeadModel is decoded by transformers' generate" in record.getMessage()


def test_generate_is_used_without_the_model_s_own_sampling_defaults() -> None:
    model = build(*UNKNOWN["gpt2"])
    plain = responses(sampled(model))
    own = transformers.GenerationConfig(repetition_penalty=5.0, min_new_tokens=9, eos_token_id=3, top_k=2)
    model.generation_config = own
    eos = plain[0][2]
    samples = sampled(model, eos=eos)
    cut = [row[: min((row.index(end) for end in (3, eos) if end in row), default=99) + 1] for row in plain]
    assert responses(samples) == cut
    assert model.generation_config is own


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_the_number_of_slots_changes_no_response(llama: Any, batch_size: int) -> None:
    endless = sampled(llama, k=3)
    eos = responses(endless)[4][3]
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in responses(endless)]
    assert len({len(row) for row in expected}) > 2
    samples = sampled(llama, k=3, eos=eos, batch_size=batch_size)
    assert responses(samples) == expected
    assert samples.ended.tolist() == [row[-1] == eos for row in expected]
    before = endless.logprobs[:, : samples.mask.shape[1]]
    torch.testing.assert_close(samples.logprobs[samples.mask], before[samples.mask], atol=1e-4, rtol=1e-4)


def test_a_response_does_not_depend_on_the_prompts_that_follow(llama: Any) -> None:
    assert responses(sampled(llama, PROMPTS[:2], k=2)) == responses(sampled(llama, k=2))[:4]


@pytest.mark.parametrize("budget", [1, 8, 2048])
def test_every_prompt_is_read_once_for_all_its_samples(
    llama: Any, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = responses(sampled(llama, k=4))
    read: list[list[int]] = []
    prefill = Llama.prefill

    def remembering(self: Llama, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        read.extend(row[:length].tolist() for row, length in zip(ids, lengths, strict=True))
        assert ids.numel() <= max(budget, 7)
        return prefill(self, ids, lengths)

    monkeypatch.setattr(Llama, "prefill", remembering)
    monkeypatch.setattr(slots, "PREFILL_TOKENS", budget)
    assert responses(sampled(llama, k=4, batch_size=3)) == expected
    assert sorted(read) == sorted(PROMPTS)


def test_rows_that_are_over_are_decoded_no_further(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "MULTIPLE", 1)
    eos = responses(sampled(llama, k=3))[4][3]
    decoded: list[int] = []
    step = Llama.step

    def counting(self: Llama, tokens: Tensor, lengths: Tensor, cache: Any) -> Tensor:
        decoded.append(len(tokens))
        return step(self, tokens, lengths, cache)

    monkeypatch.setattr(Llama, "step", counting)
    samples = sampled(llama, k=3, eos=eos, batch_size=4)
    assert sum(decoded) == int(samples.mask.sum()) - 15  # each row's first token comes with its prompt
    assert max(decoded) == 4 and decoded[: len(decoded) // 2] == [4] * (len(decoded) // 2)
    exactly, decoded = decoded, []
    monkeypatch.setattr(slots, "MULTIPLE", 3)
    again = sampled(llama, k=3, eos=eos, batch_size=4)
    assert decoded == [min(-(-rows // 3) * 3, 4) for rows in exactly] and 3 in decoded
    assert torch.equal(again.ids, samples.ids) and torch.equal(again.mask, samples.mask)


@pytest.mark.parametrize("known", [True, False])
def test_finished_rows_are_reported_as_they_finish(llama: Any, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "is_known", lambda model: known)
    told: list[int] = []
    NativeSampler(llama, NEVER, Generation(max_new_tokens=3, batch_size=4), 0).sample(PROMPTS, 2, told.append)
    assert sum(told) == 10 and len(told) == 3


@pytest.mark.parametrize(("known", "reads"), [(True, 1), (False, 2)])
def test_reading_prompts_and_sampling_are_timed_apart_by_the_tokens_of_each(
    llama: Any, known: bool, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "is_known", lambda model: known)
    phases = Phases()
    samples = NativeSampler(llama, NEVER, Generation(max_new_tokens=3, batch_size=4), 0, phases).sample(PROMPTS, 2)
    metrics = phases.lap()
    tokens = {name: metrics[f"perf/{name}_s"] * metrics[f"perf/{name}_tokens_per_s"] for name in ("prefill", "decode")}
    prompt_tokens = 7 + 2 + 1 + 4 + 3  # read once for all rows, or for each of them
    assert tokens == {"prefill": pytest.approx(reads * prompt_tokens), "decode": pytest.approx(samples.mask.sum())}
    assert ("perf/weights_s" in metrics) == known


def test_prompts_are_read_in_the_first_forward_pass_of_generate_alone(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "is_known", lambda model: False)
    passes = iter(range(100))
    clock = [0.0]

    def forward(*given: Any, **fields: Any) -> Any:
        clock[0] += 100.0 if next(passes) == 0 else 1.0
        return type(llama).forward(llama, *given, **fields)

    monkeypatch.setattr(llama, "forward", forward)
    phases = Phases(clock=lambda: clock[0])
    NativeSampler(llama, NEVER, Generation(max_new_tokens=4), 0, phases).sample(PROMPTS)
    assert phases.lap() == {
        "perf/prefill_s": 100, "perf/prefill_tokens_per_s": 0.17, "perf/decode_s": 3,
        "perf/decode_tokens_per_s": 20 / 3, "perf/other_s": 0, "perf/seconds": 103,
    }  # fmt: skip


def test_our_decoder_s_prefills_and_steps_are_timed_apart(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def lasting(function: Any, seconds: float) -> Any:
        def slow(*given: Any) -> Any:
            clock[0] += seconds
            return function(*given)

        return slow

    for name, seconds in (("__init__", 1000.0), ("prefill", 100.0), ("step", 1.0)):
        monkeypatch.setattr(Llama, name, lasting(getattr(Llama, name), seconds))
    phases = Phases(clock=lambda: clock[0])
    NativeSampler(llama, NEVER, Generation(max_new_tokens=4), 0, phases).sample(PROMPTS)
    metrics = phases.lap()
    seconds = {name: value for name, value in metrics.items() if not name.endswith("tokens_per_s")}
    assert seconds == {
        "perf/weights_s": 1000, "perf/prefill_s": 100, "perf/decode_s": 3, "perf/other_s": 0, "perf/seconds": 1103,
    }  # fmt: skip


def test_the_sampler_sees_the_weights_as_they_are_now() -> None:
    model = build("Llama", {})
    sampler = NativeSampler(model, NEVER, Generation(max_new_tokens=6), 0)
    before = sampler.sample(PROMPTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    after = sampler.sample(PROMPTS)
    assert gap(model, after).max() < 2e-4 < gap(model, before).max()


def adapted(**fields: Any) -> Any:
    model = with_lora(build("Llama", {"attention_bias": True}), Lora(rank=3, alpha=5, dropout=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_adapters_are_part_of_the_sampled_policy() -> None:
    model = adapted()
    assert is_known(model)
    samples = sampled(model, k=2)
    assert gap(model, samples, k=2).max() < 5e-4
    with model.disable_adapter():
        assert gap(model, samples, k=2).max() > 0.1
        assert gap(model, sampled(model, k=2), k=2).max() < 5e-4
    model.merge_adapter()
    assert gap(model, sampled(model, k=2), k=2).max() < 5e-4
    assert is_known(model)


def test_adapters_of_another_kind_go_to_generate() -> None:
    from peft import IA3Config, LoraConfig, get_peft_model

    kinds = [
        LoraConfig(r=2, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    ]
    for kind in kinds:
        model = get_peft_model(build("Llama", {}), kind).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        assert not is_known(model)
        assert gap(model, sampled(model)).max() < 5e-4


def test_a_model_that_someone_changed_is_not_known(llama: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Own(transformers.LlamaForCausalLM):  # type: ignore[misc]
        pass

    changed = copy.deepcopy(llama)
    changed.model.layers[1].mlp.up_proj = Doubled(32, 48, bias=False)
    assert not is_known(changed)
    assert not is_known(Own(llama.config))
    assert is_known(llama)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_under_autocast_the_decoder_is_as_close_to_the_trainer_as_generate_is(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family, {})
    with autocast("bf16"):
        fast = sampled(model, k=8)
        near = gap(model, fast, k=8)
        monkeypatch.setattr(native, "is_known", lambda model: False)
        reference = gap(model, sampled(model, k=8), k=8)
    assert 1e-4 < near.mean() < 1.3 * reference.mean()  # bfloat16, and no coarser than it has to be
    assert fast.logprobs.dtype == torch.float32


def test_under_autocast_merged_adapters_are_as_far_from_the_trainer_as_its_own_rounding() -> None:
    model = adapted()
    with autocast("bf16"):
        samples = sampled(model, k=8)
        near = gap(model, samples, k=8)
        rounded = trainers(model, samples, k=8)
    own = (rounded - trainers(model, samples, k=8))[samples.mask].abs()  # bfloat16 against float32
    assert 1e-4 < near.mean() < 2 * own.mean()


def test_a_policy_in_bfloat16_is_decoded_in_bfloat16() -> None:
    model = build("Llama", {}).bfloat16()
    samples = sampled(model, k=4)
    assert 1e-4 < gap(model, samples, k=4).mean() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 32, 70])
def test_a_linear_map_is_the_same_in_every_layout(rows: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    weight, x = torch.randn(24, 40), torch.randn(rows, 40)
    offset = torch.randn(24) if bias else None
    found = Linear(weight, offset, dtype)(x.to(dtype))
    assert found.dtype == dtype
    precision = 1e-5 if dtype != torch.bfloat16 else 0.05
    torch.testing.assert_close(found.float(), F.linear(x, weight, offset), atol=precision * 10, rtol=precision)


def test_a_transcript_by_hand() -> None:
    draws = torch.tensor([[0.1, 0.9, 0.5], [0.6, 0.1, 0.1]])
    transcript = Transcript(draws, Generation(), [2], filler=7)
    even = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]).log()
    both = torch.arange(2)
    tokens, over = transcript.extend(both, even)
    assert tokens.tolist() == [0, 1] and over.tolist() == [False, False]
    tokens, over = transcript.extend(torch.tensor([1]), torch.tensor([[0.0, 0.0, 1.0]]).log())
    assert tokens.tolist() == [2] and over.tolist() == [True]
    assert transcript.over(both).tolist() == [False, True]
    for last in (False, True):
        _, over = transcript.extend(torch.tensor([0]), even[:1])
        assert over.tolist() == [last]
    samples = transcript.samples()
    assert samples.ids.tolist() == [[0, 1, 1], [1, 2, 7]]
    assert samples.mask.tolist() == [[True] * 3, [True, True, False]]
    assert samples.ended.tolist() == [False, True]
    half = torch.tensor(0.5).log().item()
    torch.testing.assert_close(samples.logprobs, torch.tensor([[half] * 3, [half, 0.0, 0.0]]))


def test_no_prompts_get_no_responses(llama: Any, tokenizer: Any) -> None:
    assert respond(llama, tokenizer, [], Generation(), seed=0) == []
