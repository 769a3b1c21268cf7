"""The forward pass of the Llama family, written for decoding: few operations, and no bookkeeping between them.

Weights are read from the Hugging Face module when a `Llama` is made, adapters merged, projections that read the same
input joined; the module itself stays as it is. Matrices multiply in one dtype; residuals and norms are in that of the
embedding, rotations in float32: what autocast makes of the module.

Rotary positions turn the pairs (i, i + D/2) of a head. With the rows of the query and key projections reordered so
that pairs are neighbours, a rotation is one complex product; scores are sums over pairs and do not see the order.

Shapes: P prompts, T tokens, B rows, N = P T or B, H query heads, K key-value heads, D head size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from components.generation.cache import KeyValueCache, attend
from components.generation.dense import Dense, dense, join
from components.generation.linear import Linear

Attend = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, queries (N, H, D), keys and values (N, 2KD)) to what was attended to (N, HD)."""


@dataclass(frozen=True)
class Layer:
    """One block's weights."""

    input_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    """Weights (H+K, D) of the norms of queries and keys (Qwen3)."""
    output: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


class Llama:
    """A causal model of the family, as its weights are now; `components.generation.families` says which those are."""

    def __init__(self, model: Any, num_positions: int, dtype: torch.dtype) -> None:
        """Read `model`, bare or with adapters; matrices multiply in `dtype`.

        Positions from 0 to `num_positions` - 1 can be decoded.
        """
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        body, config = base.model, base.config
        self.embedding = body.embed_tokens.weight
        self.device, self.dtype = self.embedding.device, dtype
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = body.layers[0].self_attn.head_dim
        self.eps, self.activation = body.norm.variance_epsilon, body.layers[0].mlp.act_fn
        self.norm = body.norm.weight
        self.head = Linear(*dense(base.lm_head), self.dtype)
        self.layers = [self._read(layer) for layer in body.layers]
        positions = torch.arange(num_positions, device=self.device)[None]
        cos, sin = body.rotary_emb(self.embedding[:1], positions)
        half = self.size // 2
        self.turns = torch.complex(cos[0, :, :half].float(), sin[0, :, :half].float())  # (positions, D/2)

    def empty_cache(self, slots: int) -> KeyValueCache:
        """A cache for so many rows."""
        positions = len(self.turns)
        return KeyValueCache(
            len(self.layers), slots, positions, self.kv_heads, self.size, self.dtype, self.device
        )

    def prefill(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (P, V) after the last token of each prompt, and the keys and values (L, P, T, 2, K, D) of all.

        `ids` (P, T) padded on the right to `lengths` (P,): tokens see what stands before them, never the padding.
        """
        prompts, width = ids.shape
        shape = (prompts, width, 2, self.kv_heads, self.size)
        kept = torch.empty((len(self.layers), *shape), dtype=self.dtype, device=self.device)

        def causally(layer: int, queries: Tensor, keys_values: Tensor) -> Tensor:
            kept[layer] = keys_values.view(shape)
            keys, values = kept[layer].permute(2, 0, 3, 1, 4)  # (P, K, T, D) each
            queries = queries.view(prompts, width, self.heads, self.size).transpose(1, 2)
            attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
            return attended.transpose(1, 2).reshape(prompts * width, -1)

        hidden = self._blocks(ids.reshape(-1), self.turns[:width].repeat(prompts, 1), causally)
        last = torch.arange(prompts, device=self.device) * width + lengths - 1
        return self._logits(hidden[last]), kept

    def step(self, tokens: Tensor, lengths: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits (B, V) after one more token (B,) in each of the first slots, which hold `lengths` (B,) tokens."""
        rows, groups = len(tokens), self.heads // self.kv_heads
        width, mask = cache.visible(lengths, self.dtype)
        places = cache.places(lengths)

        def from_cache(layer: int, queries: Tensor, keys_values: Tensor) -> Tensor:
            cache.append(layer, places, keys_values)
            queries = queries.view(rows, self.kv_heads, groups, self.size)
            return attend(queries, *cache.read(layer, rows, width), mask).reshape(rows, -1)

        return self._logits(self._blocks(tokens, self.turns[lengths], from_cache))

    def _read(self, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        query, key = (self._reordered(dense(projection)) for projection in (attention.q_proj, attention.k_proj))
        qk_norm = None
        if hasattr(attention, "q_norm"):
            norms = [self._pairs_together(norm.weight) for norm in (attention.q_norm, attention.k_norm)]
            qk_norm = torch.cat([norms[0].expand(self.heads, -1), norms[1].expand(self.kv_heads, -1)])
        return Layer(
            layer.input_layernorm.weight,
            Linear(*join([query, key, dense(attention.v_proj)]), self.dtype),
            qk_norm,
            Linear(*dense(attention.o_proj), self.dtype),
            layer.post_attention_layernorm.weight,
            Linear(*join([dense(mlp.gate_proj), dense(mlp.up_proj)]), self.dtype),
            Linear(*dense(mlp.down_proj), self.dtype),
        )

    def _reordered(self, projection: Dense) -> Dense:
        weight, bias = projection
        return self._pairs_together(weight), None if bias is None else self._pairs_together(bias)

    def _pairs_together(self, rows: Tensor) -> Tensor:
        """Rows (heads x D, ...) or (D,) with each head's first and second half interleaved."""
        pairs: Tensor = rows.unflatten(0, (-1, 2, self.size // 2))
        return pairs.transpose(1, 2).reshape(rows.shape)

    def _blocks(self, tokens: Tensor, turns: Tensor, attend: Attend) -> Tensor:
        """Hidden states (N, hidden) of `tokens` (N,) at the positions of `turns` (N, D/2), before the last norm."""
        hidden = F.embedding(tokens, self.embedding)
        turns = turns[:, None]  # (N, 1, D/2)
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(self._normed(hidden, layer.input_norm))
            queries = self._rotated(qkv, turns, layer.qk_norm)
            keys_values = qkv[:, self.heads * self.size :]
            hidden = hidden + layer.output(attend(number, queries, keys_values))
            gate, up = layer.gate_up(self._normed(hidden, layer.post_norm)).chunk(2, dim=-1)
            hidden = hidden + layer.down(self.activation(gate) * up)
        return hidden

    def _rotated(self, qkv: Tensor, turns: Tensor, norm: Tensor | None) -> Tensor:
        """The queries (N, H, D) in `qkv` (N, HD+2KD), normed and rotated in place as the keys are."""
        heads = self.heads + self.kv_heads
        qk = qkv[:, : heads * self.size].unflatten(1, (heads, self.size))
        source = qk.float()
        if norm is not None:
            source = (F.rms_norm(source, (self.size,), None, self.eps).to(self.dtype) * norm).float()
        pairs = torch.view_as_complex(source.unflatten(2, (-1, 2)))
        qk.copy_(torch.view_as_real(pairs * turns).flatten(2))
        queries: Tensor = qk[:, : self.heads]
        return queries

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        normed: Tensor = F.rms_norm(hidden, weight.shape, weight, self.eps)
        return normed.to(self.dtype)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head(self._normed(hidden, self.norm))
