"""Log-probabilities of given tokens: logits for the asked places alone, and never for all of them at once.

Between hidden states and log-probabilities stands a tensor as wide as the vocabulary, the largest of a whole update.
Here it exists for some rows at a time, in the forward pass and, computed again, in the backward pass.

Shapes: B rows, P prompt, R response tokens, N tokens asked for, C of them at a time, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from components.gathering import gathered
from components.packed import Packed, Row, backbone, pack, rows_of
from components.products import outer, product

READABLE = ("gemma", "gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""Architectures (config.model_type) whose logits are the output layer's product with the last hidden states and
nothing more (no bias, scale or cap); tests compare each with its own logits. All others compute their own logits."""
CHUNK = 1 << 22
"""Logits at a time: 16 MiB in float32. Where there are no more, they are kept for the backward pass."""
MIN_CHUNK = 256
"""Tokens at a time at least, so that reading the output layer's weights does not take longer than using them."""


class Tokens(NamedTuple):
    """What a model says of given tokens."""

    logprobs: Tensor
    """(N,), in float32."""
    entropy: Tensor
    """(N,) of the distributions that they were taken from."""
    likeliest: Tensor
    """(N,), true where the token was the likeliest; no gradient."""


class LanguageModel(nn.Module):
    """A causal language model, read for the log-probabilities of given tokens."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, rows: Sequence[Row]) -> Tokens:
        """What the model says of the response tokens (N,), row after row."""
        return token_logprobs(self.policy, pack(self.policy, rows), temperature=1.0)[0]


def response_logprobs(
    model: Any, input_ids: Tensor, mask: Tensor, response_length: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (B, R) of the last R tokens, from the policy sampled at `temperature`.

    The first response token is predicted at the last prompt position; the softmax is in float32. `mask` (B, P+R)
    is true on real tokens; results under a false mask are 0.
    """
    packed = pack(model, rows_of(input_ids, mask, response_length))
    tokens, _ = token_logprobs(model, packed, temperature)
    seen = mask[:, -response_length:]
    return spread(tokens.logprobs, seen), spread(tokens.entropy, seen)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values (N,) in the places (B, R) where the mask is true, row after row; 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def token_logprobs(
    model: Any, packed: Packed, temperature: float, with_hidden: bool = False
) -> tuple[Tokens, Tensor | None]:
    """What `model` says of the response tokens (N,) and, asked for, the hidden states (N, H) they were chosen in."""
    if (layer := output_layer(model)) is None:
        output = model(**packed.inputs(), output_hidden_states=with_hidden)
        logits = output.logits.flatten(0, 1)[packed.before]
        hidden = output.hidden_states[-1].flatten(0, 1)[packed.before] if with_hidden else None
        return _statistics(logits, packed.taken, temperature), hidden
    hidden = backbone(model)(**packed.inputs())[0].flatten(0, 1)[packed.before]
    with gathered([layer.weight]):  # ZeRO's hooks bring it only for a pass through all that is trained
        chosen = _Taken.apply(hidden, layer.weight, packed.taken, temperature)  # type: ignore[no-untyped-call]
    return Tokens(*chosen), hidden


def output_layer(model: Any) -> nn.Linear | None:
    """The layer that turns the model's last hidden states into logits; None where more than that is done."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in READABLE:
        return None
    layer = model.get_output_embeddings()
    return layer if type(layer) is nn.Linear and layer.bias is None else None


def _statistics(logits: Tensor, taken: Tensor, temperature: float) -> Tokens:
    """The same of tokens (N,) from logits (N, V), with torch's own gradient."""
    logprobs = _log_softmax(logits, temperature)
    right = logprobs.detach().argmax(-1) == taken
    return Tokens(logprobs.gather(1, taken[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(1), right)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (C, V), in float32 unless the logits are finer."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits.to(wide) if temperature == 1 else logits.to(wide) / temperature, dim=1)


class _Taken(torch.autograd.Function):
    """`Tokens` from hidden states (N, H) and the output layer's weight (V, H), some tokens at a time.

    With z the logits over the temperature, p their softmax and E its entropy: d log p_t / dz = [t] - p and
    dE / dz = -p (log p + E). The products are in the precision of autocast, as those of a linear layer are.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, taken: Tensor, temperature: float) -> tuple[Tensor, ...]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        ctx.temperature, ctx.dtypes = temperature, (hidden.dtype, weight.dtype)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        rows = max(MIN_CHUNK, CHUNK // len(weight))
        parts, kept = list[Tokens](), None
        with torch.autocast(kind, enabled=False):
            for some, its_taken in zip(hidden.split(rows), taken.split(rows), strict=True):
                kept = _log_softmax(product(some, weight), temperature)
                chosen = kept.gather(1, its_taken[:, None]).squeeze(1)
                entropy = -torch.linalg.vecdot(kept.exp(), kept)
                parts.append(Tokens(chosen, entropy, kept.argmax(1) == its_taken))
        tokens = Tokens(*(torch.cat(column) for column in zip(*parts, strict=True)))
        ctx.rows = rows
        ctx.save_for_backward(hidden, weight, taken, tokens.entropy, kept if len(parts) == 1 else None)
        ctx.mark_non_differentiable(tokens.likeliest)
        ctx.set_materialize_grads(False)
        return tuple(tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_chosen: Tensor | None, of_entropy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        hidden, weight, taken, entropy, kept = ctx.saved_tensors
        into_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        into_weight = torch.zeros_like(weight, dtype=ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), ctx.rows):
                place = slice(start, start + ctx.rows)
                logprobs = _log_softmax(product(hidden[place], weight), ctx.temperature) if kept is None else kept
                into_logits = _into_logits(
                    logprobs,
                    taken[place],
                    None if of_chosen is None else of_chosen[place],
                    None if of_entropy is None else of_entropy[place],
                    entropy[place],
                )
                scaled = into_logits.div_(ctx.temperature).to(weight.dtype)
                if into_hidden is not None:
                    into_hidden[place] = product(scaled, weight.T)
                if into_weight is not None:
                    into_weight += outer(scaled, hidden[place])
        return None if into_hidden is None else into_hidden.to(ctx.dtypes[0]), into_weight, None, None


def _into_logits(
    logprobs: Tensor, taken: Tensor, of_chosen: Tensor | None, of_entropy: Tensor | None, entropy: Tensor
) -> Tensor:
    """The gradient (C, V) of the logits from that of the chosen tokens' log-probabilities and of the entropies."""
    of_chosen = torch.zeros_like(entropy) if of_chosen is None else of_chosen
    weights = of_chosen[:, None]
    if of_entropy is not None:
        weights = weights + (logprobs + entropy[:, None]) * of_entropy[:, None]
    return logprobs.exp().mul_(-weights).scatter_add_(1, taken[:, None], of_chosen[:, None])
