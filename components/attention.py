"""Attention of rows that share a prompt: a response attends to the prompt and to itself, and nothing else is computed.

torch's kernel for attention takes a mask of what a token sees, but computes what the mask hides; on CPUs it is slow for
short rows besides. Here two products per response make the scores, in float32.

Shapes: S sequences, T tokens of the longest, H query heads, K key-value heads, G = H / K, D head size; P tokens of the
longest prompt, n responses to a prompt, R tokens of the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures (config.model_type) that hand `shared` down to their attention; tests compare each with rows alone."""
SCORES = 1 << 22
"""Scores of a layer at most, 16 MiB: they are kept for the backward pass, which torch's kernel does without."""


@dataclass(frozen=True)
class Shared:
    """Where the prompts and the responses of a forward pass are."""

    shape: tuple[int, int, int, int]
    """S, n, R, P."""
    places: Tensor
    """(S n R,): the responses' tokens in the flattened S * T, anything where a response is shorter."""
    real: Tensor
    """(N,): which of those are tokens."""
    beyond: Tensor | None
    """(S, 1, 1, P), true beyond the prompt of a sequence; None where all are equally long."""


def shared(prompts: Sequence[int], responses: Sequence[Sequence[int]], width: int, device: torch.device) -> Shared:
    """The plan for sequences of so many prompt tokens and then so many of each response, padded to `width`.

    From then on transformers' models hand such plans to `attend`.
    """
    _install()
    count, longest, prompt = max(map(len, responses)), max(map(max, responses)), max(prompts)
    places = torch.zeros(len(prompts), count, longest, dtype=torch.long)
    real = torch.zeros(places.shape, dtype=torch.bool)
    for sequence, (start, lengths) in enumerate(zip(prompts, responses, strict=True)):
        place = sequence * width + start
        for number, length in enumerate(lengths):
            places[sequence, number, :length] = torch.arange(place, place + length)
            real[sequence, number, :length] = True
            place += length
    beyond = torch.arange(prompt) >= torch.tensor(prompts)[:, None]
    return Shared(
        (len(prompts), count, longest, prompt),
        places.flatten().to(device),
        real.flatten().nonzero().squeeze(1).to(device),
        beyond[:, None, None].to(device) if min(prompts) < prompt else None,
    )


def pairs(prompts: Sequence[int], responses: Sequence[Sequence[int]]) -> int:
    """Pairs of tokens that `attend` looks at: those of the prompts, and each response with its prompt and itself."""
    count, longest, prompt = max(map(len, responses)), max(map(max, responses)), max(prompts)
    return len(prompts) * (prompt * prompt + count * longest * (prompt + longest))


def pays(config: Any, device: torch.device, prompts: Sequence[int], responses: Sequence[Sequence[int]]) -> bool:
    """Whether `attend` is the better way for a model to read such sequences."""
    if device.type != "cpu" or config.model_type not in KINDS or not max(map(max, responses)):
        return False
    return pairs(prompts, responses) * int(config.num_attention_heads) <= SCORES


@cache
def _install() -> None:
    """Let transformers' models hand a plan, given to them as `shared`, to `attend`; all else goes where it went."""
    from transformers import AttentionInterface

    plain: Any = AttentionInterface()["sdpa"]

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
        plan = given.pop("shared", None)
        if plan is None or given.get("dropout"):  # the mask says the same
            return plain(module, query, key, value, mask, **given)
        return attend(query, key, value, plan, given["scaling"]), None

    AttentionInterface.register("sdpa", attention)


def attend(query: Tensor, key: Tensor, value: Tensor, plan: Shared, scaling: float) -> Tensor:
    """What the tokens take from `value`: (S, T, H, D), of query (S, H, T, D), key and value (S, K, T, D)."""
    with torch.autocast(query.device.type, enabled=False):
        queries, keys, values = query.float() * scaling, key.float(), value.float()
        prompt = plan.shape[3]
        prompts = F.scaled_dot_product_attention(
            queries[:, :, :prompt], keys[:, :, :prompt], values[:, :, :prompt],
            is_causal=True, scale=1.0, enable_gqa=True,
        )  # fmt: skip
        responses = _responses(queries, keys, values, plan)
        return _Together.apply(prompts.transpose(1, 2), responses, plan, query.shape[2]).to(query.dtype)  # type: ignore[no-any-return, no-untyped-call]


def _responses(queries: Tensor, keys: Tensor, values: Tensor, plan: Shared) -> Tensor:
    """What the responses' tokens take: (S n R, H, D)."""
    sequences, count, longest, prompt = plan.shape
    kv_heads, groups, size = keys.shape[1], queries.shape[1] // keys.shape[1], keys.shape[3]

    def own(states: Tensor) -> Tensor:
        """(S, K, n, G R, D) of the responses, the heads of one key-value head one after another."""
        taken = _Taken.apply(states.transpose(1, 2).flatten(0, 1), plan).unflatten(1, (kv_heads, -1))  # type: ignore[no-untyped-call]
        taken = taken.view(sequences, count, longest, kv_heads, -1, size).permute(0, 3, 1, 4, 2, 5)
        return taken.reshape(sequences, kv_heads, count, -1, size)  # type: ignore[no-any-return]

    asked, own_keys, own_values = own(queries), own(keys), own(values)
    to_prompt = asked.flatten(2, 3) @ keys[:, :, :prompt].transpose(2, 3)  # (S, K, n G R, P)
    if plan.beyond is not None:
        to_prompt = to_prompt.masked_fill(plan.beyond, float("-inf"))
    to_own = (asked @ own_keys.transpose(3, 4)).unflatten(3, (groups, longest))  # (S, K, n, G, R, R)
    later = torch.ones(longest, longest, dtype=torch.bool, device=keys.device).triu(1)
    to_own = to_own.masked_fill(later, float("-inf")).flatten(2, 4)
    weights = torch.cat([to_prompt, to_own], dim=-1).softmax(-1)  # (S, K, n G R, P + R)
    from_own = weights[..., prompt:].unflatten(2, (count, -1)) @ own_values
    taken = (weights[..., :prompt] @ values[:, :, :prompt]).view_as(from_own) + from_own
    heads_last: Tensor = taken.view(sequences, kv_heads, count, groups, longest, size).permute(0, 2, 4, 1, 3, 5)
    return heads_last.reshape(sequences * count * longest, kv_heads * groups, size)


class _Taken(torch.autograd.Function):
    """The states (S n R, ...) of the responses' tokens, from all (S T, ...)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, plan: Shared) -> Tensor:
        ctx.plan, ctx.shape = plan, states.shape
        return states[plan.places]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        return gradient.new_zeros(ctx.shape).index_copy_(0, plan.places[plan.real], gradient[plan.real]), None


class _Together(torch.autograd.Function):
    """States (S, T, H, D) of all tokens, from those of the prompts (S, P, H, D) and of the responses (S n R, H, D)."""

    @staticmethod
    def forward(ctx: Any, prompts: Tensor, responses: Tensor, plan: Shared, width: int) -> Tensor:
        ctx.plan, ctx.prompt = plan, prompts.shape[1]
        states = prompts.new_zeros(prompts.shape[0], width, *prompts.shape[2:])
        states[:, : prompts.shape[1]] = prompts
        states.flatten(0, 1).index_copy_(0, plan.places[plan.real], responses[plan.real])
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        plan, flat = ctx.plan, gradient.flatten(0, 1)
        places = plan.places[plan.real]
        into_responses = gradient.new_zeros(len(plan.places), *gradient.shape[2:])
        into_responses[plan.real] = flat[places]
        into_prompts = flat.index_fill(0, places, 0.0).view(gradient.shape)[:, : ctx.prompt]
        return into_prompts, into_responses, None, None
