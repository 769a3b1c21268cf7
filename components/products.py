"""Products of matrices in float32 on CPUs, by the library that is faster there.

torch multiplies with MKL, which uses half of the vector width of processors that are not Intel's. There oneDNN, which
torch brings along too, takes half the time for the same arithmetic (benchmarks/README.md); elsewhere nothing changes.

Shapes: M rows, K inputs, N outputs.
"""

import os
import platform
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CPU_INFO = Path("/proc/cpuinfo")
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    # oneDNN and torch's layer above it keep the code that they make for every shape, some 0.3 MB each. Rows of all
    # lengths come by: 1024 shapes, the default, hold half a gigabyte and are seldom met again.
    os.environ.setdefault(_cache, "128")


def quicken(model: nn.Module) -> None:
    """Let every plain linear layer of the model multiply by `linear`; weights, names and types stay what they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b (..., N) of x (..., K), weight (N, K) and bias (N,), with a gradient."""
    if not (_is_plain(x) and _is_plain(weight)):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b' (M, N) of a (M, K) and b (N, K), without a gradient; transposed views are no slower than copies."""
    if not (_is_plain(a) and _is_plain(b) and a.numel() and b.numel()):
        return a @ b.T
    return _onednn(a, b, None)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a' b (M, N), a sum over the rows of a (K, M) and b (K, N), without a gradient."""
    if a.shape[1] <= b.shape[1]:  # the first factor is the one that is copied
        return product(a.T, b.T)
    return product(b.T, a.T).T


def _forward(module: Any, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        if not x.numel():
            return F.linear(x, weight, bias)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, of_x, of_weight, of_bias = gradient.flatten(0, -2), None, None, None
        if ctx.needs_input_grad[0]:
            of_x = product(rows, weight.T).view(x.shape)
        if ctx.needs_input_grad[1]:
            of_weight = outer(rows, x.flatten(0, -2))
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_weight, of_bias


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")  # type: ignore[no-any-return]


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is multiplied in float32, on a processor where that is worth a second library."""
    return (
        tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and _is_held_back()
    )


@cache
def _is_held_back() -> bool:
    """Whether MKL leaves vector units of this processor unused: AVX-512 that is not Intel's."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not CPU_INFO.is_file():
        return False
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return "GenuineIntel" not in CPU_INFO.read_text()
