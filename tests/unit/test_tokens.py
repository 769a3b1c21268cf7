"""Text to token ids and back."""

from pathlib import Path
from typing import Any

import pytest

from components.errors import InputError
from components.records import Message
from components.tokens import (
    DEFAULT_TEMPLATE,
    cut_to_length,
    decode_response,
    encode_prompt,
    encode_response,
    load_tokenizer,
    pad,
    position_ids,
    template_digest,
)

USER = (Message("user", "say red"),)
TURNS = (
    Message("system", "be kind"),
    Message("user", "say red"),
    Message("assistant", "red"),
    Message("user", "and?"),
)


@pytest.mark.parametrize("prompt", [USER, TURNS])
def test_prompt_and_response_are_the_template_s_ids_of_the_whole_dialogue(
    tokenizer: Any, prompt: Any
) -> None:
    dialogue = [
        {"role": message.role, "content": message.content}
        for message in (*prompt, Message("assistant", "yes"))
    ]
    whole = tokenizer(tokenizer.apply_chat_template(dialogue, tokenize=False), add_special_tokens=False)[
        "input_ids"
    ]
    assert encode_prompt(tokenizer, prompt) + encode_response(tokenizer, "yes") == whole


def test_a_prompt_reads_back_as_the_rendered_template(tokenizer: Any) -> None:
    assert tokenizer.decode(encode_prompt(tokenizer, USER)) == "<|user|>say red<|assistant|>"


def test_a_template_with_a_bos_token_gives_one_bos(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    with_bos = load_tokenizer(tmp_path)
    with_bos.add_special_tokens({"bos_token": "<|begin|>"})
    with_bos.add_bos_token = True
    with_bos.chat_template = "<|begin|>" + with_bos.chat_template
    ids = encode_prompt(with_bos, USER)
    assert ids.count(with_bos.bos_token_id) == 1 and ids[0] == with_bos.bos_token_id
    assert with_bos.bos_token_id not in encode_response(with_bos, "yes")


@pytest.mark.parametrize("text", ["yes, red", "", " leading space", "emoji 🙂 and ünïcode", "two\nlines"])
def test_a_response_survives_encoding_and_decoding(tokenizer: Any, text: str) -> None:
    assert decode_response(tokenizer, encode_response(tokenizer, text)) == text


def test_only_a_response_that_ended_carries_the_end_token(tokenizer: Any) -> None:
    ended, cut = encode_response(tokenizer, "yes"), encode_response(tokenizer, "yes", ended=False)
    assert ended == [*cut, tokenizer.eos_token_id]
    assert tokenizer.eos_token_id not in cut


@pytest.mark.parametrize("text", ["no <|end|>", "<|assistant|>yes<|user|>", "<|pad|>"])
def test_what_is_spelt_like_a_special_token_stays_text(tokenizer: Any, text: str) -> None:
    ids = encode_response(tokenizer, text, ended=False)
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert decode_response(tokenizer, ids) == text
    assert tokenizer.eos_token_id in encode_prompt(tokenizer, TURNS)  # a template's special tokens remain special


def test_decoding_changes_no_spaces(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    tidying = load_tokenizer(tmp_path)
    tidying.clean_up_tokenization_spaces = True
    tidying.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    text = "so , it is n't ."
    assert tidying.decode(encode_response(tidying, text, ended=False)) != text
    assert decode_response(tidying, encode_response(tidying, text)) == text


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (9, ([1, 2, 3, 4], [7, 8, 9])),
        (5, ([3, 4], [7, 8, 9])),
        (4, ([4], [7, 8, 9])),
        (3, ([4], [7, 8])),
        (2, ([4], [7])),
    ],
)
def test_a_prompt_loses_its_oldest_tokens_and_a_response_its_last(max_length: int, expected: Any) -> None:
    assert cut_to_length([1, 2, 3, 4], [7, 8, 9], max_length) == expected


def test_padding_is_marked_by_the_mask_and_not_by_value() -> None:
    for side, ids, mask in (
        ("right", [[5, 0], [6, 7]], [[True, False], [True, True]]),
        ("left", [[0, 5], [6, 7]], [[False, True], [True, True]]),
    ):
        padded, real = pad([[5], [6, 7]], 0, side)
        assert padded.tolist() == ids and real.tolist() == mask


def test_positions_count_real_tokens_whichever_side_is_padded() -> None:
    _, left = pad([[5], [6, 7, 8]], 0, "left")
    assert position_ids(left)[0, -1] == 0 and position_ids(left)[1].tolist() == [0, 1, 2]
    _, right = pad([[5], [6, 7, 8]], 0)
    assert position_ids(right)[0, 0] == 0 and position_ids(right)[1].tolist() == [0, 1, 2]


def test_the_digest_changes_with_the_template_and_its_special_tokens(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    other = load_tokenizer(tmp_path)
    assert template_digest(other) == template_digest(tokenizer)
    other.chat_template += " "
    changed = template_digest(other)
    assert changed != template_digest(tokenizer)
    other.add_special_tokens({"eos_token": "<|stop|>"})
    assert template_digest(other) != changed


def test_a_tokenizer_without_template_or_pad_gets_both(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    bare = load_tokenizer(tmp_path)
    bare.chat_template, bare.pad_token = None, None
    bare.save_pretrained(tmp_path / "bare")
    loaded = load_tokenizer(tmp_path / "bare")
    assert loaded.chat_template == DEFAULT_TEMPLATE
    assert loaded.pad_token_id == loaded.eos_token_id
    assert loaded.decode(encode_prompt(loaded, TURNS)).endswith(
        "Assistant: red\n\nHuman: and?\n\nAssistant: "
    )


def test_a_folder_without_a_tokenizer_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{tmp_path}: no tokenizer \(tokenizer.json\)"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_token_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    endless = load_tokenizer(tmp_path)
    endless.eos_token = None
    endless.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no eos_token"):
        load_tokenizer(tmp_path)


def test_the_default_template_begins_as_the_model_begins_texts(policy_folder: Path, tmp_path: Path) -> None:
    from tokenizers import processors

    folder = tmp_path / "begins"
    tokenizer = load_tokenizer(policy_folder)
    tokenizer.chat_template = None
    tokenizer.bos_token = "<|user|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", bos)]
    )
    tokenizer.save_pretrained(str(folder))
    ids = encode_prompt(load_tokenizer(folder), (Message("user", "hello"),))
    assert ids[0] == bos
    assert ids.count(bos) == 1
