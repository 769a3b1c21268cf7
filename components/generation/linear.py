"""y = x W' + b with a copy of the weight in the layout and dtype in which it multiplies fastest.

On x86 CPUs that is oneDNN's own blocked layout, arranged once: in float32 it multiplies a few rows about twice as
fast as the BLAS call behind `torch.nn.functional.linear`, with the same arithmetic up to the order of the sums
(benchmarks/decoding.py). The two operators are those that torch.compile puts into its frozen graphs.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 32
"""The number of rows the layout is chosen for; any number is accepted."""


class Linear:
    """A linear map of what was in a module's weight (out, in) and bias (out,) when it was made."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.bias = None if bias is None else bias.to(dtype)
        self.weight = weight.to(dtype)
        self.blocked = _multiplies_blocked(self.weight)
        if self.blocked:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, in) to (rows, out)."""
        if self.blocked:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return y
        return F.linear(x, self.weight, self.bias)


def _multiplies_blocked(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
