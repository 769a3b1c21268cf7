"""Token by token: the same response as in evaluation, and text that never has to be taken back."""

from pathlib import Path
from typing import Any

import pytest
import torch

from components.base.architecture import train_tokenizer, untrained_llama
from components.generation import respond
from components.records import Message
from components.serving.stream import Detokenizer, Sampling, StopScanner, stream_response
from components.settings import Generation
from components.tokens import decode_response, encode_prompt

TEXT = "naïve café – 木の下 🙂👩‍👩‍👧 done"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["what colour has the sky", "the sky is blue"], 300)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    torch.manual_seed(1)
    return untrained_llama("1m", tokenizer, 128).eval()


def test_pieces_are_whole_characters_and_together_the_text(tokenizer: Any) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) > len(TEXT)  # characters outside the training text are several byte tokens
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) + detokenizer.flush() == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_cut_off_at_the_end_is_not_shown(tokenizer: Any) -> None:
    ids = tokenizer("blue 🙂")["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    shown = "".join(detokenizer.push(token) for token in ids[:-1]) + detokenizer.flush()
    assert shown == "blue "


def test_bytes_that_are_no_character_do_not_hold_back_what_follows(tokenizer: Any) -> None:
    half, rest = tokenizer("木")["input_ids"][:1], tokenizer(" sky")["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    shown = "".join(detokenizer.push(token) for token in [*half, *rest])
    assert shown == "\ufffd sky"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("END",), "one E two EN "),
        (("ENDING", "D th"), "one E two EN EN"),
        (("nothing",), "one E two EN END three E"),
        (("two", "END"), "one E "),
        ((), "one E two EN END three E"),
    ],
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(
    stop: tuple[str, ...], expected: str, size: int
) -> None:
    text = "one E two EN END three E"
    scanner = StopScanner(stop)
    pieces = [scanner.push(text[start : start + size]) for start in range(0, len(text), size)]
    assert "".join(pieces) + scanner.flush() == expected
    assert scanner.stopped == (expected != text)


@pytest.mark.parametrize("word", ["sky", "木"])
def test_a_greedy_stream_is_the_response_of_evaluation(model: Any, tokenizer: Any, word: str) -> None:
    generation = Generation(max_new_tokens=12, temperature=0)
    prompt = (Message("user", word),)
    (expected,) = respond(model, tokenizer, [prompt], generation, seed=0)
    ids = encode_prompt(tokenizer, prompt)
    pieces = list(stream_response(model, tokenizer, ids, Sampling(generation, 0), {tokenizer.eos_token_id}))
    assert "".join(piece.text for piece in pieces) == expected.text.rstrip("\ufffd")
    assert sum(piece.num_tokens for piece in pieces) == expected.num_tokens
    assert [piece.finish for piece in pieces][-1] == ("stop" if expected.ended else "length")
    assert not any(piece.finish for piece in pieces[:-1])


def test_a_seed_repeats_a_response_and_another_one_does_not(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("the sky")["input_ids"]

    def text(seed: int) -> str:
        sampling = Sampling(Generation(max_new_tokens=12), seed)
        return "".join(piece.text for piece in stream_response(model, tokenizer, ids, sampling, ()))

    assert text(1) == text(1) != text(2)


def test_the_end_token_ends_and_is_counted_but_not_shown(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("the sky")["input_ids"]
    sampling = Sampling(Generation(max_new_tokens=12, temperature=0), 0)
    every = range(model.config.vocab_size)
    pieces = list(stream_response(model, tokenizer, ids, sampling, every))
    assert [(piece.text, piece.num_tokens, piece.finish) for piece in pieces] == [("", 1, "stop")]


def test_a_cancelled_stream_stops_decoding(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("the sky")["input_ids"]
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 3

    sampling = Sampling(Generation(max_new_tokens=50), 0)
    pieces = list(stream_response(model, tokenizer, ids, sampling, (), cancelled))
    assert len(asked) == 4 and not any(piece.finish for piece in pieces)


def test_a_sentencepiece_decoder_keeps_its_leading_spaces(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["</s>"], show_progress=False)
    unigram.train_from_iterator(["the sky is blue and the sea is green"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="</s>")
    ids = tokenizer("the sky is green", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    assert "".join(detokenizer.push(token) for token in ids) == "the sky is green"
    assert decode_response(tokenizer, ids) == "the sky is green"
