"""Rows as sequences for one forward pass: nothing on the left, and one prompt for all rows that begin with it.

Padding stands on the right alone, where causal attention hides it from every real token, so that no mask is needed.
Rows with the same prompt may become one sequence: the prompt, then their responses one after another, each of which
sees the prompt and itself, at the positions it has when it is alone. That saves the prompt's arithmetic for all rows
but the first and costs attention between responses, which is masked but computed; rows share where that pays.

Shapes: B rows, P prompt, R response tokens, S sequences, T tokens of the longest, N response tokens of all rows, H
hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from components import attention
from components.attention import Shared

SHARING = ("gemma", "gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""Architectures (config.model_type) whose attention takes a mask of our own; tests compare each with rows alone."""
TOKEN_PAIRS = 4
"""Pairs of attention that the rest of a token's arithmetic is worth, per hidden unit: 6 by the multiplications of a
Llama block (12 H^2 weights against 2 H per pair), 4 as timed on CPU, where attention is the slower kind."""


class Row(NamedTuple):
    """Token ids of a prompt and of the response to it."""

    prompt: Sequence[int]
    """At least one; what several rows begin with."""
    response: Sequence[int]
    """None where only the state of the last token is asked for."""


def whole_rows(input_ids: Tensor, mask: Tensor) -> list[Row]:
    """The rows of padded ids (B, T) for a model that is asked for the state of their last token."""
    return [Row(row[seen].tolist(), ()) for row, seen in zip(input_ids.cpu(), mask.cpu(), strict=True)]


def rows_of(input_ids: Tensor, attention_mask: Tensor, response_length: int) -> list[Row]:
    """The rows of padded ids (B, P+R): the last `response_length` columns hold the responses."""
    width = input_ids.shape[1] - response_length
    ids, mask = input_ids.cpu(), attention_mask.cpu()
    return [
        Row(row[:width][seen[:width]].tolist(), row[width:][seen[width:]].tolist())
        for row, seen in zip(ids, mask, strict=True)
    ]


@dataclass(frozen=True)
class Packed:
    """What a model reads in one forward pass, and where in it the rows' tokens are."""

    input_ids: Tensor
    """(S, T), padded right."""
    position_ids: Tensor | None
    """(S, T) where rows share; else every token's position is its column."""
    attention_mask: Tensor | None
    """(S, 1, T, T), true where a token sees another, where rows share; else attention is causal and no more."""
    ends: Tensor
    """(B,): each row's last token, as a place in the flattened S * T."""
    before: Tensor
    """(N,): the token before each response token, in whose state it is chosen, row after row."""
    taken: Tensor
    """(N,): the ids of the response tokens, row after row."""

    shared: Shared | None
    """The same as the mask, where the model's attention goes by it."""

    def inputs(self) -> dict[str, Any]:
        """Arguments for the forward pass of a Hugging Face model."""
        masks = {"attention_mask": self.attention_mask, "position_ids": self.position_ids}
        plan = {} if self.shared is None else {"shared": self.shared}
        alone = {"input_ids": self.input_ids, "use_cache": False}
        return alone if self.attention_mask is None else alone | masks | plan


def pack(model: Any, rows: Sequence[Row]) -> Packed:
    """The rows for `model`, on its device: sharing prompts where it can and where that is less work."""
    alone = [[number] for number in range(len(rows))]
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(tuple(row.prompt), []).append(number)
    shared = list(groups.values())
    device = next(model.parameters()).device
    worth = token_pairs(model, max(len(row.prompt) + len(row.response) for row in rows))
    if not worth or len(shared) == len(rows):
        return _laid_out(rows, alone, device)
    planned = attention.pays(model.config, device, *_parts(rows, shared))
    pairs = attention.pairs(*_parts(rows, shared)) if planned else None
    if _work(rows, shared, worth, pairs) >= _work(rows, alone, worth):
        return _laid_out(rows, alone, device)
    return _laid_out(rows, shared, device, planned)


def token_pairs(model: Any, longest: int) -> int:
    """Pairs of attention that a token is worth to this model; 0 where rows of up to `longest` tokens cannot share."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in SHARING or config._attn_implementation != "sdpa":
        return 0
    window: int | None = getattr(config, "sliding_window", None)
    if window is not None and longest > window and getattr(config, "use_sliding_window", True):
        return 0
    return TOKEN_PAIRS * int(config.hidden_size)


def _work(rows: Sequence[Row], groups: Sequence[Sequence[int]], worth: int, pairs: int | None = None) -> int:
    """The work of reading the rows so grouped, in pairs of attention; `pairs` of them, or all that a mask has."""
    longest = max(_length(rows, group) for group in groups)
    return len(groups) * longest * worth + (len(groups) * longest * longest if pairs is None else pairs)


def _parts(rows: Sequence[Row], groups: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """For each group the tokens of its prompt, and those of each response."""
    prompts = [len(rows[group[0]].prompt) for group in groups]
    return prompts, [[len(rows[number].response) for number in group] for group in groups]


def _length(rows: Sequence[Row], group: Sequence[int]) -> int:
    return len(rows[group[0]].prompt) + sum(len(rows[number].response) for number in group)


def _laid_out(
    rows: Sequence[Row], groups: Sequence[Sequence[int]], device: torch.device, planned: bool = False
) -> Packed:
    """The rows of each group as one sequence; `planned` where attention goes by more than a mask."""
    width = max(_length(rows, group) for group in groups)
    ids = torch.zeros(len(groups), width, dtype=torch.long)
    positions, part = torch.zeros_like(ids), torch.full_like(ids, -1)  # part: 0 prompt, n the nth response
    ends, before = [0] * len(rows), [list[int]()] * len(rows)
    for sequence, group in enumerate(groups):
        prompt = rows[group[0]].prompt
        assert prompt, "the first token of a response is predicted from the prompt"
        first, place = sequence * width, len(prompt)
        _write(sequence, 0, prompt, 0, 0, ids, positions, part)
        for count, number in enumerate(group, start=1):
            response = rows[number].response
            _write(sequence, place, response, len(prompt), count, ids, positions, part)
            states = [len(prompt) - 1, *range(place, place + len(response))]
            ends[number], before[number] = first + states[-1], [first + state for state in states[:-1]]
            place += len(response)
    shared = len(groups) < len(rows)
    return Packed(
        ids.to(device),
        positions.to(device) if shared else None,
        _visible(part.to(device)) if shared else None,
        torch.tensor(ends, device=device),
        torch.tensor([place for places in before for place in places], dtype=torch.long, device=device),
        torch.tensor([token for row in rows for token in row.response], dtype=torch.long, device=device),
        attention.shared(*_parts(rows, groups), width, device) if planned else None,
    )


def _write(
    sequence: int, place: int, tokens: Sequence[int], position: int, number: int, ids: Tensor, *about: Tensor
) -> None:
    """Put tokens into a sequence at `place`, their positions counted from `position`, as part `number` of it."""
    positions, part = about
    columns = slice(place, place + len(tokens))
    ids[sequence, columns] = torch.tensor(tokens, dtype=torch.long)
    positions[sequence, columns] = torch.arange(position, position + len(tokens))
    part[sequence, columns] = number


def _visible(part: Tensor) -> Tensor:
    """(S, 1, T, T): a token sees those before it of the prompt and of its own part; padding sees padding."""
    same = part[:, :, None] == part[:, None, :]
    causal = torch.ones(part.shape[1], part.shape[1], dtype=torch.bool, device=part.device).tril()
    return ((same | (part == 0)[:, None, :]) & causal)[:, None]


def backbone(model: Any) -> Any:
    """The network below a Hugging Face model's head, its adapters in place."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return getattr(inner, inner.base_model_prefix)
