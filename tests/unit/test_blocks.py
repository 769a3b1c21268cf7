"""Norms and gated networks that keep less for the backward pass are transformers' own, with the same gradients."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components.blocks import FAMILIES, slim
from components.models import load_policy, with_lora
from components.products import quicken
from components.settings import Lora

IDS = torch.tensor([[5, 6, 7, 8], [9, 5, 5, 6]])


def made(family: str, **fields: Any) -> Any:
    """A random model of a family with norms that are not all ones."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=16, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=6,
        intermediate_size=20, **fields,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def learned(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The loss and the gradient of every parameter."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


def kept(model: nn.Module) -> int:
    """Bytes that the backward pass waits for, each storage counted once."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids=IDS, labels=IDS)
        return sum(size for place, size in storages.items() if place not in own)


@pytest.mark.parametrize("prepare", [slim, lambda model: (quicken(model), slim(model))], ids=["alone", "quickened"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_slim_model_is_the_same_model_and_keeps_less(family: str, prepare: Callable[[nn.Module], object]) -> None:
    plain = made(family)
    model = copy.deepcopy(plain)
    prepare(model)
    ours, theirs = learned(model), learned(plain)
    assert list(ours) == list(theirs) and len(ours) > 15
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=1e-5, rtol=1e-4, msg=name)
    before = copy.deepcopy(plain)
    quicken(before)
    assert kept(model) < 0.8 * kept(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_it_differs_no_more_than_rounding(family: str) -> None:
    plain = made(family)
    model = copy.deepcopy(plain)
    slim(model)
    ours, theirs = learned(model, torch.bfloat16), learned(plain, torch.bfloat16)
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(ours[name], expected, atol=0.02 * scale, rtol=0.02, msg=name)
    assert kept(model) < kept(plain)


def test_weights_in_bfloat16_are_read_as_transformers_reads_them() -> None:
    plain = made("Llama").bfloat16()
    model = copy.deepcopy(plain)
    slim(model)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, atol=0.05, rtol=0.02)


def test_in_float64_gradients_are_those_of_small_differences() -> None:
    model = made("Llama").double()
    slim(model)
    network = model.model.layers[0].mlp
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    weight = network.down_proj.weight
    assert torch.autograd.gradcheck(network, (x,))
    assert torch.autograd.gradcheck(lambda _: network(x), (weight,))


@pytest.mark.parametrize("change", ["bias", "adapter", "hook"])
def test_what_the_last_projection_has_beside_its_weight_is_not_passed_by(change: str) -> None:
    plain = made("Llama", mlp_bias=change == "bias")
    if change == "adapter":
        plain = with_lora(plain, Lora(rank=2))
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    model = copy.deepcopy(plain)
    slim(model)
    calls: list[nn.Module] = []
    if change == "hook":
        for layer in model.model.layers:
            layer.mlp.down_proj.register_forward_pre_hook(lambda module, _: calls.append(module))
    ours, theirs = learned(model), learned(plain)
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=1e-5, rtol=1e-4, msg=name)
    assert len(calls) == (2 if change == "hook" else 0)


def test_only_gradients_that_are_asked_for_are_computed() -> None:
    plain = made("Llama")
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("layers.0.mlp.up_proj" in name)
    model = copy.deepcopy(plain)
    slim(model)
    ours, theirs = learned(model), learned(plain)
    assert list(ours) == ["loss", "model.layers.0.mlp.up_proj.weight"] == list(theirs)
    torch.testing.assert_close(ours["model.layers.0.mlp.up_proj.weight"], theirs["model.layers.0.mlp.up_proj.weight"])


def test_another_activation_is_left_alone() -> None:
    model = made("Llama", hidden_act="gelu")
    slim(model)
    for layer in model.model.layers:
        assert "forward" not in layer.mlp.__dict__ and "forward" in layer.input_layernorm.__dict__


def test_a_loaded_model_is_slim(policy_folder: Any) -> None:
    layer = load_policy(policy_folder).model.layers[0]
    for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
        assert "forward" in part.__dict__


def test_no_rows_are_read_as_no_rows() -> None:
    model = made("Llama")
    slim(model)
    x = torch.zeros(0, 3, 12, requires_grad=True)
    layer = model.model.layers[0]
    found = layer.mlp(layer.input_layernorm(x))
    found.sum().backward()
    assert found.shape == (0, 3, 12) and x.grad is not None and x.grad.shape == x.shape
