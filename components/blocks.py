"""Norms and feed-forward networks of the Llama family that keep less for the backward pass.

autograd keeps what every operation read: of a norm its input and the normed rows, of a gated network four tensors as
wide as its inner layer. Here a norm keeps its input and a network its two inner projections; the rest is computed again
from them, which takes a few passes over memory and no product of matrices.

Shapes: H hidden size, I inner size.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from components.products import outer, product

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Whose norms and networks are known; tests compare each with transformers' own."""


def slim(model: nn.Module) -> None:
    """Let the model's norms and gated networks keep less; weights, names, types and results stay what they are."""
    for module in model.modules():
        kind = type(module).__name__
        if kind in [f"{family}RMSNorm" for family in FAMILIES]:
            module.forward = MethodType(_norm, module)
        elif kind in [f"{family}MLP" for family in FAMILIES] and _is_silu(module.act_fn):
            module.forward = MethodType(_network, module)


def _is_silu(activation: Any) -> bool:
    sample = torch.linspace(-4.0, 4.0, 9)
    return torch.equal(activation(sample), F.silu(sample))


def _norm(module: Any, x: Tensor) -> Tensor:
    if x.dtype is not torch.float32 or module.weight.dtype is not torch.float32:  # rounds between the two factors
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    return _Norm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-any-return, no-untyped-call]


def _network(module: Any, x: Tensor) -> Tensor:
    gate, up, down = module.gate_proj(x), module.up_proj(x), module.down_proj
    if _is_bare(down) and gate.dtype is down.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return _GatedDown.apply(gate, up, down.weight)  # type: ignore[no-any-return, no-untyped-call]
    return down(_Gated.apply(gate, up))  # type: ignore[no-any-return, no-untyped-call]


def _is_bare(layer: Any) -> bool:
    """Whether calling a layer does nothing but multiply by its weight: no bias, no adapter, no hook that fetches it."""
    hooked = bool(layer._forward_pre_hooks or layer._forward_hooks or layer._backward_hooks)
    return type(layer) is nn.Linear and not hooked and list(layer._parameters.values())[1:] == [None]


class _Norm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) w, (..., H) of x (..., H) and w (H,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            ctx.save_for_backward(x, scale, weight)
            normed: Tensor = x * scale
            return normed.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        normed, of_x, of_weight = x * scale, None, None
        along = gradient * normed
        if ctx.needs_input_grad[1]:
            of_weight = along.flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            share = along.mul_(weight).mean(-1, keepdim=True)
            of_x = (gradient * weight).addcmul_(normed, share, value=-1).mul_(scale)
        return of_x, of_weight, None


class _Gated(torch.autograd.Function):
    """silu(gate) up, (..., I)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        return _of_gate(gradient * up, gate), F.silu(gate).mul_(gradient)


class _GatedDown(torch.autograd.Function):
    """silu(gate) up w', (..., H) of gate and up (..., I) and w (H, I)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        inner = F.silu(gate).mul_(up)
        return product(inner.flatten(0, -2), weight).view(*gate.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        rows, activated, of_weight = gradient.flatten(0, -2), F.silu(gate), None
        if ctx.needs_input_grad[2]:
            of_weight = outer(rows, (activated * up).flatten(0, -2))
        of_inner = product(rows, weight.T).view(gate.shape)
        of_up = activated.mul_(of_inner)
        return _of_gate(of_inner.mul_(up), gate), of_up, of_weight


def _of_gate(of_activated: Tensor, gate: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(of_activated, gate)  # type: ignore[no-any-return]
