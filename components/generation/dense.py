"""The matrix that a linear module multiplies by at this moment, its adapters included."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

Dense = tuple[Tensor, Tensor | None]
"""Weight (out, in) and bias (out,), if there is one."""


def is_dense(module: Any) -> bool:
    """Whether `dense` knows the module: a plain linear layer, or one with plain low-rank adapters on it."""
    if type(module) is nn.Linear:
        return True
    if type(getattr(module, "base_layer", None)) is not nn.Linear:
        return False
    from peft.tuners.lora import Linear as LoraLinear

    if type(module) is not LoraLinear or module.lora_variant:
        return False
    return all(adapter in module.lora_A for adapter in module.active_adapters) and not any(module.lora_bias.values())


def dense(module: Any) -> Dense:
    """Weight and bias; adapters that are switched on and not merged already are added to the weight.

    In bfloat16 the sum is rounded as a whole, where the trainer rounds weight and adapter apart: the sampler is then as
    far from the trainer as bfloat16 is from float32.
    """
    if type(module) is nn.Linear:
        return module.weight, module.bias
    base = module.base_layer
    if module.merged or module.disable_adapters:
        return base.weight, base.bias
    return sum((module.get_delta_weight(name) for name in module.active_adapters), start=base.weight), base.bias


def join(parts: Iterable[Dense]) -> Dense:
    """Projections of one input as one; a projection without bias among others with one has zeros."""
    weights, biases = zip(*parts, strict=True)
    if all(bias is None for bias in biases):
        return torch.cat(weights), None
    filled = [
        weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in zip(weights, biases, strict=True)
    ]
    return torch.cat(weights), torch.cat(filled)
