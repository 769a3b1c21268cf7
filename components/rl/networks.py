"""The networks under training, as one module: the policy and its critics.

Shapes: N rows, P prompt tokens, R response tokens, H hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from components.logprobs import spread, token_logprobs
from components.models import ScalarModel
from components.packed import pack, rows_of
from components.rl.types import Forward


class Networks(nn.Module):
    """One forward pass over prompt and response.

    A critic is a scalar model with weights of its own, or a head on the policy's hidden states (all of one kind).
    """

    def __init__(
        self,
        policy: Any,
        value: ScalarModel | nn.Module | None = None,
        cost_value: ScalarModel | nn.Module | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.policy, self.value, self.cost_value = policy, value, cost_value
        self.temperature = temperature

    @property
    def has_critics(self) -> bool:
        """Whether a forward pass is asked for values too."""
        return self.value is not None or self.cost_value is not None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_length: int,
        temperature: float | None = None,
        critics: bool = True,
    ) -> Forward:
        """Log-probabilities, entropies and values (N, R) at the last `response_length` tokens; 0 under a false mask.

        A value is that of the state in which its token is chosen.
        `temperature` replaces the one that responses are sampled at; values are left out without `critics`.
        """
        rows, mask = rows_of(input_ids, attention_mask, response_length), attention_mask[:, -response_length:]
        tokens, hidden = token_logprobs(
            self.policy,
            pack(self.policy, rows),
            self.temperature if temperature is None else temperature,
            with_hidden=critics and any(isinstance(critic, SharedHead) for critic in (self.value, self.cost_value)),
        )

        def values(critic: nn.Module | None) -> Tensor | None:
            if critic is None or not critics:
                return None
            if isinstance(critic, SharedHead):
                return spread(critic(hidden), mask)
            packed = pack(critic.model, rows)
            return spread(critic(packed, packed.before), mask)

        return Forward(
            spread(tokens.logprobs, mask), spread(tokens.entropy, mask), values(self.value), values(self.cost_value)
        )


class SharedHead(nn.Module):
    """A critic on the policy's hidden states, which it reads without a gradient: it cannot harm the policy.

    One hidden layer, and a last layer of zeros, so that every first value is 0.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        last = nn.Linear(hidden_size, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.Tanh(), last)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (...) of hidden states (..., H), in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.layers(hidden.detach().float()).squeeze(-1)  # type: ignore[no-any-return]


@torch.no_grad()
def in_parts(function: Any, parts: Sequence[Tensor], *tensors: Tensor) -> list[Any]:
    """The function's results over the rows of the tensors, those of one part at a time."""
    return [function(*(tensor[rows] for tensor in tensors)) for rows in parts]


def in_order(parts: Sequence[Tensor], results: Sequence[Tensor]) -> Tensor:
    """The results of all parts as one tensor, every row back in its place."""
    found = torch.cat(list(results))
    return found[torch.cat(list(parts)).argsort()]
