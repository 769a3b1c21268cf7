"""The networks under training, as one module: the policy and its critics.

Shapes: N rows, P prompt tokens, R response tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from components.models import ScalarModel, response_logprobs
from components.rl.types import Forward


class PolicyAndValues(nn.Module):
    """One forward pass over prompt and response; each network has its own weights."""

    def __init__(self, policy: Any, value: ScalarModel, cost_value: ScalarModel | None, temperature: float) -> None:
        super().__init__()
        self.policy, self.value, self.cost_value = policy, value, cost_value
        self.temperature = temperature

    def forward(self, input_ids: Tensor, attention_mask: Tensor, response_length: int) -> Forward:
        """Log-probabilities, entropies and values (N, R) at the last `response_length` tokens."""
        logprobs, entropy = response_logprobs(
            self.policy, input_ids, attention_mask, response_length, self.temperature
        )
        return Forward(
            logprobs,
            entropy,
            before_each_token(self.value(input_ids, attention_mask), response_length),
            None
            if self.cost_value is None
            else before_each_token(self.cost_value(input_ids, attention_mask), response_length),
        )


def before_each_token(values: Tensor, response_length: int) -> Tensor:
    """From values (N, P+R) those (N, R) of the states in which the response tokens are chosen."""
    return values[:, -response_length - 1 : -1]


@torch.no_grad()
def in_parts(function: Any, parts: int, *tensors: Tensor) -> list[Any]:
    """The function's results over the rows of the tensors, at most `parts` rows at a time."""
    pieces = zip(*(tensor.split(parts) for tensor in tensors), strict=True)
    return [function(*piece) for piece in pieces]
