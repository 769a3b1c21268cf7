"""The reference policy: a frozen copy, or the policy without its adapters, which must be back afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components.divergence import kl_estimate
from components.logprobs import response_logprobs
from components.models import load_policy, with_lora
from components.rl.assembly import build_reference
from components.rl.reference import AdapterOff, FrozenReference
from components.rl.settings import RLSettings
from components.settings import Compute, Lora

IDS = torch.tensor([[9, 10, 11, 40, 41, 42], [0, 12, 13, 43, 44, 0], [7, 8, 9, 10, 11, 12]])
MASK = torch.tensor([[True] * 6, [False, True, True, True, True, False], [True] * 6])
LENGTH = 3


@pytest.fixture
def adapted(policy_folder: Path) -> Any:
    """A policy whose adapters have learned something."""
    policy = with_lora(load_policy(policy_folder), Lora(rank=4))
    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return policy


def read(reference: Any, temperature: float = 1.0, micro: int = 100) -> Tensor:
    parts = list(torch.arange(len(IDS)).split(micro))
    found = reference.logprobs(IDS, MASK, LENGTH, temperature, parts)
    assert isinstance(found, Tensor)
    return found


def logits(policy: Any) -> Tensor:
    with torch.no_grad():
        found = policy(input_ids=IDS).logits
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_without_its_adapters_the_policy_is_the_model_they_were_put_on(
    adapted: Any, policy_folder: Path, temperature: float
) -> None:
    frozen = FrozenReference(load_policy(policy_folder), "fp32")
    off = read(AdapterOff(adapted, "fp32"), temperature)
    torch.testing.assert_close(off, read(frozen, temperature), atol=1e-6, rtol=0)
    on = response_logprobs(adapted, IDS, MASK, LENGTH, temperature)[0]
    assert (on - off).abs().max() > 0.01


def test_the_adapters_are_back_with_their_gradients(adapted: Any) -> None:
    before, trainable = logits(adapted), [p.requires_grad for p in adapted.parameters()]
    reference = AdapterOff(adapted, "fp32")
    for _ in range(2):
        read(reference)
    assert torch.equal(logits(adapted), before)
    assert [p.requires_grad for p in adapted.parameters()] == trainable and any(trainable)
    response_logprobs(adapted, IDS, MASK, LENGTH)[0].sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_the_adapters_are_back_after_a_reading_that_failed(adapted: Any) -> None:
    before = logits(adapted)
    with pytest.raises(IndexError):
        AdapterOff(adapted, "fp32").logprobs(IDS + 10_000, MASK, LENGTH, 1.0, [torch.arange(len(IDS))])
    assert torch.equal(logits(adapted), before)


@pytest.mark.parametrize("kind", ["adapters", "copy"])
def test_no_gradient_reaches_the_reference_and_micro_batches_change_nothing(
    kind: str, adapted: Any, policy_folder: Path
) -> None:
    frozen = FrozenReference(load_policy(policy_folder), "fp32")
    reference = AdapterOff(adapted, "fp32") if kind == "adapters" else frozen
    whole = read(reference)
    assert not whole.requires_grad
    for micro in (1, 2):
        torch.testing.assert_close(read(reference, micro=micro), whole, atol=1e-5, rtol=1e-5)


def test_the_reference_computes_in_the_dtype_of_training(policy_folder: Path) -> None:
    model = load_policy(policy_folder)
    full, half = (read(FrozenReference(model, dtype)) for dtype in ("fp32", "bf16"))
    assert full.dtype == half.dtype == torch.float32
    assert 1e-5 < (full - half).abs().max() < 0.5


def test_a_reference_in_bf16_starts_a_little_away_from_the_policy(policy_folder: Path) -> None:
    policy = load_policy(policy_folder)
    compute = Compute(dtype="fp32")
    reference = build_reference(RLSettings(frozen_dtype="bf16", compute=compute), policy, policy_folder)
    assert isinstance(reference, FrozenReference)
    assert {parameter.dtype for parameter in reference.model.parameters()} == {torch.bfloat16}
    mask = MASK[:, -LENGTH:]
    log_ratio = response_logprobs(policy, IDS, MASK, LENGTH)[0] - read(reference)
    per_token = kl_estimate(log_ratio, torch.zeros_like(log_ratio), "k3")[mask]
    assert read(reference).dtype == torch.float32
    assert 0 < log_ratio[mask].abs().mean() < 0.05 and 0 < per_token.mean() < 1e-3
    plain = build_reference(RLSettings(compute=compute), policy, policy_folder)
    assert torch.equal(read(plain), response_logprobs(policy, IDS, MASK, LENGTH)[0])


def test_with_adapters_the_reference_is_no_second_model(adapted: Any, policy_folder: Path) -> None:
    with_adapters = build_reference(RLSettings(lora=Lora(rank=4)), adapted, policy_folder)
    assert isinstance(with_adapters, AdapterOff) and with_adapters.policy is adapted
    policy = load_policy(policy_folder)
    copied = build_reference(RLSettings(), policy, policy_folder)
    assert isinstance(copied, FrozenReference) and copied.model is not policy
