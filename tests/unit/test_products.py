"""Products through oneDNN are those of torch, with the same gradients, wherever they are taken."""

import copy
import platform
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components import products
from components.models import load_policy, with_lora
from components.products import linear, outer, product, quicken
from components.settings import Lora

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available(),
    reason="oneDNN multiplies on x86 alone",
)


@pytest.fixture(autouse=True)
def held_back(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Any processor is treated as one where oneDNN is worth it; the list has an entry for each of its products."""
    calls: list[int] = []
    onednn = products._onednn

    def counted(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(len(a))
        return onednn(a, b, bias)

    monkeypatch.setattr(products, "_is_held_back", lambda: True)
    monkeypatch.setattr(products, "_onednn", counted)
    return calls


def gradients(function: object, *inputs: Tensor | None) -> list[Tensor]:
    given = [None if tensor is None else tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*given)  # type: ignore[operator]
    wanted = [tensor for tensor in given if tensor is not None]
    return [output, *torch.autograd.grad(output.sin().sum(), wanted)]


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5), (1, 5), (2, 1, 5)])
@pytest.mark.parametrize(("outputs", "with_bias"), [(3, True), (9, False)])
def test_a_linear_map_and_its_gradients_are_torchs(
    shape: tuple[int, ...], outputs: int, with_bias: bool, held_back: list[int]
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(outputs, 5)
    bias = torch.randn(outputs) if with_bias else None
    for ours, theirs in zip(gradients(linear, x, weight, bias), gradients(F.linear, x, weight, bias), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(held_back) == 3  # the output and two gradients


def test_only_gradients_that_are_asked_for_are_computed(held_back: list[int]) -> None:
    x, weight = torch.randn(4, 5, requires_grad=True), torch.randn(3, 5)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, 5))
    assert len(held_back) == 2


@pytest.mark.parametrize(("wide", "narrow"), [(6, 2), (2, 6)])
def test_products_of_transposed_views(wide: int, narrow: int) -> None:
    a, b = torch.randn(wide, 4), torch.randn(4, narrow)
    torch.testing.assert_close(product(a, b.T), a @ b)
    torch.testing.assert_close(outer(a.T, b), a @ b)


@pytest.mark.parametrize("rows", [(0, 5), (2, 0, 5)])
def test_nothing_times_something_is_nothing(rows: tuple[int, ...], held_back: list[int]) -> None:
    x, weight = torch.zeros(rows, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    result = linear(x, weight)
    assert result.shape == (*rows[:-1], 3)
    result.sum().backward()
    assert x.grad is not None and x.grad.shape == rows
    torch.testing.assert_close(weight.grad, torch.zeros(3, 5))
    assert held_back == []


def test_other_dtypes_and_autocast_are_left_to_torch(held_back: list[int]) -> None:
    x, weight = torch.randn(2, 5), torch.randn(3, 5)
    assert linear(x.double(), weight.double()).dtype == torch.float64
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    torch.testing.assert_close(product(x.double(), weight.double()), x.double() @ weight.double().T)
    assert held_back == []


def test_processors_that_mkl_uses_whole_are_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, held_back: list[int]
) -> None:
    monkeypatch.setattr(products, "_is_held_back", lambda: False)
    x, weight = torch.randn(2, 5), torch.randn(3, 5)
    torch.testing.assert_close(linear(x, weight), x @ weight.T)
    torch.testing.assert_close(product(x, weight), x @ weight.T)
    assert held_back == []


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False)],
)
def test_which_processors_mkl_holds_back(
    vendor: str, capability: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(products, "CPU_INFO", info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products._is_held_back.__wrapped__() is expected
    monkeypatch.setattr(products, "CPU_INFO", tmp_path / "none")
    assert products._is_held_back.__wrapped__() is False


def test_a_quickened_model_is_the_same_model(policy_folder: Path, held_back: list[int]) -> None:
    model = load_policy(policy_folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module.__dict__.pop("forward", None)
    assert list(plain.state_dict()) == list(model.state_dict())
    ours, theirs = model(ids).logits, plain(ids).logits
    assert held_back
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    ours.logsumexp(-1).sum().backward()
    theirs.logsumexp(-1).sum().backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_copy_of_a_quickened_layer_multiplies_by_its_own_weight() -> None:
    layer = nn.Linear(3, 3)
    quicken(layer)
    other = copy.deepcopy(layer)
    nn.init.zeros_(other.weight)
    nn.init.zeros_(other.bias)
    x = torch.ones(1, 3)
    assert not other(x).any() and layer(x).any()


def test_adapters_stand_on_quickened_layers(policy_folder: Path, held_back: list[int]) -> None:
    model = with_lora(load_policy(policy_folder), Lora(rank=2))
    before = len(held_back)
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert len(held_back) > before
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)
