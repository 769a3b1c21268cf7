"""The reference policy: a frozen copy, or the trained policy with its adapters switched off."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from components.logprobs import response_logprobs
from components.models import autocast
from components.rl.networks import in_order, in_parts


class Reference(Protocol):
    """Where log-probabilities are compared with."""

    def logprobs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_length: int,
        temperature: float,
        parts: Sequence[Tensor],
    ) -> Tensor:
        """Log-probabilities (B, R) of the last `response_length` tokens, the rows of a part at a time, no gradient."""
        ...


class FrozenReference:
    """A model that nothing trains."""

    def __init__(self, model: Any, dtype: str) -> None:
        self.model, self.dtype = model, dtype

    def logprobs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_length: int,
        temperature: float,
        parts: Sequence[Tensor],
    ) -> Tensor:
        """Log-probabilities (B, R), in the arithmetic of training: policy and reference must not differ by dtype."""

        def read(ids: Tensor, mask: Tensor) -> Tensor:
            return response_logprobs(self.model, ids, mask, response_length, temperature)[0]

        with autocast(self.dtype):
            return in_order(parts, in_parts(read, parts, input_ids, attention_mask))


class AdapterOff:
    """The policy without its adapters, which are back as soon as it has been read."""

    def __init__(self, policy: Any, dtype: str) -> None:
        self.policy, self.inner = policy, FrozenReference(policy, dtype)

    def logprobs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_length: int,
        temperature: float,
        parts: Sequence[Tensor],
    ) -> Tensor:
        """Log-probabilities (B, R) of the weights that the adapters were put on."""
        with self.policy.disable_adapter():
            return self.inner.logprobs(input_ids, attention_mask, response_length, temperature, parts)
