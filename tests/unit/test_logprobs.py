"""Log-probabilities of given tokens: the plain formula's, in both directions, and never all logits at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from components import logprobs
from components.logprobs import READABLE, LanguageModel, Tokens, output_layer, response_logprobs, token_logprobs
from components.models import autocast, load_policy, with_lora
from components.packed import Row, pack, rows_of
from components.settings import Lora

HIDDEN, VOCABULARY = 6, 11
IDS = torch.tensor([[9, 10, 11, 40, 41, 42], [0, 12, 13, 43, 44, 0]])
MASK = torch.tensor([[True] * 6, [False, True, True, True, True, False]])
ROWS = [Row([10, 11, 12], [20, 21, 22, 23]), Row([13], [24, 25]), Row([10, 11, 12], [26])]
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def taken(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 0.7
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = logprobs._Taken.apply(hidden, weight, tokens, temperature)
    return found


def plainly(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """The same with every logit at once."""
    every = torch.log_softmax(hidden @ weight.T / temperature, dim=1)
    chosen = every[torch.arange(len(tokens)), tokens]
    return chosen, -(every.exp() * every).sum(1), every.argmax(1) == tokens


@pytest.fixture(params=[2, 1000], ids=["in-chunks", "kept"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens at a time: some of them, whose logits are computed again, or all, whose logits are kept."""
    monkeypatch.setattr(logprobs, "MIN_CHUNK", request.param)
    monkeypatch.setattr(logprobs, "CHUNK", 1)
    return int(request.param)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(5, HIDDEN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.tensor([3, 0, 10, 3, 7])


def test_tokens_are_those_of_the_plain_formula(chunk: int, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    for found, expected in zip(taken(*inputs), plainly(*inputs), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    assert taken(*inputs)[0].dtype == torch.float64


@pytest.mark.parametrize("used", ["logprobs", "entropy", "both"])
def test_gradients_are_those_of_finite_differences(
    used: str, chunk: int, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    hidden, weight, tokens = inputs

    def read(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        chosen, entropy, _ = taken(hidden, weight, tokens)
        return {"logprobs": (chosen,), "entropy": (entropy,), "both": (chosen, entropy)}[used]

    assert torch.autograd.gradcheck(read, (hidden, weight))


def test_no_tokens_give_empty_results_and_no_gradient(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, tokens = inputs
    chosen, entropy, right = taken(hidden[:0], weight, tokens[:0])
    (chosen.sum() + entropy.sum()).backward()
    assert chosen.shape == entropy.shape == right.shape == (0,)
    assert weight.grad is not None and (weight.grad == 0).all()


def test_no_more_logits_than_a_chunk_holds_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    whole = logprobs._log_softmax

    def watched(logits: Tensor, temperature: float) -> Tensor:
        made.append(len(logits))
        return whole(logits, temperature)

    monkeypatch.setattr(logprobs, "_log_softmax", watched)
    monkeypatch.setattr(logprobs, "MIN_CHUNK", 2)
    monkeypatch.setattr(logprobs, "CHUNK", 4 * VOCABULARY)
    hidden, weight = torch.randn(10, HIDDEN, requires_grad=True), torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    chosen = taken(hidden, weight, torch.zeros(10, dtype=torch.long))[0]
    assert made == [4, 4, 2]
    assert chosen.grad_fn is not None
    saved = [tensor for tensor in chosen.grad_fn.saved_tensors if tensor is not None]  # type: ignore[attr-defined]
    assert max(tensor.numel() for tensor in saved) == VOCABULARY * HIDDEN  # no (N, V) waits for the backward pass
    chosen.sum().backward()
    assert made == [4, 4, 2] * 2


def test_logits_that_one_chunk_holds_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    whole = logprobs._log_softmax

    def watched(logits: Tensor, temperature: float) -> Tensor:
        made.append(len(logits))
        return whole(logits, temperature)

    monkeypatch.setattr(logprobs, "_log_softmax", watched)
    hidden = torch.randn(10, HIDDEN, requires_grad=True)
    taken(hidden, torch.randn(VOCABULARY, HIDDEN), torch.zeros(10, dtype=torch.long))[0].sum().backward()
    assert made == [10] and hidden.grad is not None


def architecture(kind: str) -> Any:
    """A tiny random causal language model of an architecture."""
    sizes = SIZES | {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    if kind != "gpt2":
        sizes |= {"num_key_value_heads": 1, "intermediate_size": 32, "head_dim": 8}
    config = type(transformers.AutoConfig.for_model(kind))(**sizes)
    return spread_out(transformers.AutoModelForCausalLM.from_config(config).eval())


def spread_out(model: Any) -> Any:
    """The model with weights large enough that position and context matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def naive(model: Any, row: Row, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a row's response from the model's own logits of the row alone."""
    ids = torch.tensor([[*row.prompt, *row.response]])
    every = torch.log_softmax(model(input_ids=ids).logits[0].float() / temperature, -1)[len(row.prompt) - 1 : -1]
    return every.gather(1, torch.tensor(row.response)[:, None])[:, 0], -(every.exp() * every).sum(1)


@pytest.mark.parametrize("kind", READABLE)
def test_a_readable_architecture_says_what_its_own_logits_say(kind: str) -> None:
    model = architecture(kind)
    assert output_layer(model) is not None
    found, hidden = token_logprobs(model, pack(model, ROWS), 0.7)
    expected = [naive(model, row, 0.7) for row in ROWS]
    torch.testing.assert_close(found.logprobs, torch.cat([chosen for chosen, _ in expected]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.entropy, torch.cat([entropy for _, entropy in expected]), atol=1e-4, rtol=1e-4)
    assert hidden is not None and hidden.shape == (7, 16) and found.logprobs.std() > 0.1
    seen = []
    for loss in (found.logprobs.sum(), sum(chosen.sum() for chosen, _ in expected)):
        seen.append(torch.autograd.grad(loss, list(model.parameters())))
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_logits_that_are_capped_or_scaled_or_biased_are_the_models_own() -> None:
    sizes = SIZES | {"num_key_value_heads": 1, "intermediate_size": 32, "head_dim": 8, "pad_token_id": 0}
    capped = spread_out(
        transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, final_logit_softcapping=0.5)).eval()
    )
    llama = spread_out(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval())
    llama.lm_head = nn.Linear(16, 64, bias=True)
    nn.init.normal_(llama.lm_head.bias)
    for model in (capped, llama):
        assert output_layer(model) is None
        found, _ = token_logprobs(model, pack(model, ROWS), 0.7)
        expected = torch.cat([naive(model, row, 0.7)[0] for row in ROWS])
        torch.testing.assert_close(found.logprobs, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lora", [0, 4])
def test_tied_weights_and_adapters_get_the_gradients_of_the_plain_formula(lora: int, policy_folder: Path) -> None:
    seen = []
    for read in ("ours", "plain"):
        model = load_policy(policy_folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        torch.manual_seed(3)
        model = with_lora(model, Lora(rank=lora))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        if read == "ours":
            chosen, entropy = response_logprobs(model, IDS, MASK, 3, 0.7)
        else:
            parts = [naive(model, row, 0.7) for row in rows_of(IDS, MASK, 3)]
            chosen, entropy = torch.cat([c for c, _ in parts]), torch.cat([e for _, e in parts])
        (2 * chosen.sum() + entropy.sum()).backward()
        seen.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert seen[0].keys() == seen[1].keys() and len(seen[0]) > 4
    assert any("embed_tokens" in name for name in seen[0]) is (lora == 0)
    for name, gradient in seen[0].items():
        torch.testing.assert_close(gradient, seen[1][name], atol=1e-3, rtol=1e-3)


def test_bf16_computes_as_a_linear_layer_does_under_autocast(policy_folder: Path, chunk: int) -> None:
    model = load_policy(policy_folder)
    hidden = torch.randn(7, 32)
    seen = []
    for own in (True, False):
        weight, states = model.lm_head.weight.detach().clone().requires_grad_(), hidden.clone().requires_grad_()
        tokens = torch.arange(7)
        with autocast("bf16"):
            if own:
                chosen = taken(states, weight, tokens, 1.0)[0]
            else:
                chosen = logprobs._statistics(nn.functional.linear(states, weight), tokens, 1.0).logprobs
        chosen.sum().backward()
        seen.append((chosen, states.grad, weight.grad))
    assert seen[0][0].dtype == torch.float32
    assert torch.equal(seen[0][0], seen[1][0])
    for ours, theirs in zip(seen[0][1:], seen[1][1:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


def test_results_under_a_false_mask_are_zero(policy_folder: Path) -> None:
    chosen, entropy = response_logprobs(load_policy(policy_folder), IDS, MASK, 3)
    assert (chosen != 0).tolist() == (entropy != 0).tolist() == MASK[:, 3:].tolist()


def test_what_the_likeliest_token_is(policy_folder: Path) -> None:
    model = load_policy(policy_folder)
    with torch.no_grad():
        best = int(model(torch.tensor([[10, 11]])).logits[0, -1].argmax())
        tokens: Tokens = LanguageModel(model)([Row([10, 11], [best]), Row([10, 11], [best + 1])])
    assert tokens.likeliest.tolist() == [True, False]
