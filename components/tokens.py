"""Text to token ids and back: one rule for the prompt, one for the response, the same in every step.

A prompt is rendered by the tokenizer's chat template with the generation prompt added; a response is tokenised on
its own and closed with the end-of-sequence token. Padding is never told from content by value: every padded
tensor comes with a mask.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.artifacts import json_digest
from components.errors import InputError
from components.records import Conversation

if TYPE_CHECKING:
    import torch

Tokenizer = Any
"""A Hugging Face fast tokenizer; typed loosely because the library's own types do not say what it accepts."""

DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ '\n\n' if not loop.first else '' }}"
    "{{ {'user': 'Human', 'assistant': 'Assistant', 'system': 'System'}[message.role] }}: {{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant: ' }}{% endif %}"
)
"""For base models without a chat template: the transcript form of the HH-RLHF data."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder, with a chat template.

    Padding is always masked here, so any id serves as filler; the base step gives a model that lacks one a pad
    token of its own, for the sake of other tools. Raises InputError when the folder holds no tokenizer or it has
    no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(
            f"{folder}: no tokenizer (tokenizer.json). Copy the tokenizer of the model's base into the folder."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception on a broken file
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder}: the tokenizer cannot be read ({reason}). Copy its files again.") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: the tokenizer has no eos_token; set one in tokenizer_config.json.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        tokenizer.chat_template = ("{{ bos_token }}" if _starts_with_bos(tokenizer) else "") + DEFAULT_TEMPLATE
    return tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: Conversation) -> list[int]:
    """The ids of the rendered conversation, up to where the response begins."""
    messages = [{"role": message.role, "content": message.content} for message in prompt]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_response(tokenizer: Tokenizer, response: str, ended: bool = True) -> list[int]:
    """The ids of the response; a response that `ended` carries the end-of-sequence token.

    Text is text: what is spelt like a special token (as another model's tokenizer may well decode it) is no such token.
    """
    ids = list(tokenizer(response, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    return [*ids, tokenizer.eos_token_id] if ended else ids


def decode_response(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of a response, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def cut_to_length(prompt: list[int], response: list[int], max_length: int) -> tuple[list[int], list[int]]:
    """Both cut to `max_length` together: the prompt keeps its last tokens, the response its first.

    A response longer than the whole length leaves one prompt token, from which its first token is predicted.
    """
    response = response[: max_length - 1]
    return prompt[-(max_length - len(response)) :], response


def pad(rows: Sequence[Sequence[int]], filler: int, side: str = "right") -> "tuple[torch.Tensor, torch.Tensor]":
    """Ids (B, T) padded to the longest row, and a mask (B, T) that is true on real tokens."""
    import torch

    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), filler, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, place] = torch.tensor(row, dtype=torch.long)
        mask[index, place] = True
    return ids, mask


def position_ids(mask: "torch.Tensor") -> "torch.Tensor":
    """Positions (B, T) counted over real tokens only, so that padding on the left moves nothing."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def template_digest(tokenizer: Tokenizer) -> str:
    """A digest of the chat template and of the special tokens that frame it."""
    return json_digest([tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token])


def _starts_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts a beginning-of-sequence token before plain text, as its model was trained with."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id
