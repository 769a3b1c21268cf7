"""What each form of row says."""

from typing import Any

import pytest

from components.preprocess.cleaning import clean_text, to_record
from components.preprocess.dialogues import parse_transcript
from components.preprocess.dropped import LeftOut
from components.preprocess.formats import ACCEPTED, FORMS, Example, detect, parse
from components.preprocess.mixing import shares
from components.preprocess.sources import Row
from components.records import Message

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}


def read(value: Any, kind: str = "prompts") -> list[Example]:
    row = Row(value, "x.jsonl row 1", "x.jsonl:1")
    return list(parse(row, detect(row, kind)))


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ("q", "prompt"),
        ({"prompt": "q", "category": "fact"}, "prompt"),
        ({"prompt": "q", "response": "a"}, "response"),
        ({"messages": [USER, ASSISTANT]}, "messages"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "pair"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, "pair"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "hh"),
        ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0}, "safe-rlhf"),
    ],
)
def test_every_form_is_told_by_its_keys(value: Any, form: str) -> None:
    assert detect(Row(value, "here", "x:1"), "prompts") == form
    assert form in FORMS and form in ACCEPTED["prompts"]


def test_a_safe_rlhf_row_says_which_response_helps_and_which_is_harmless() -> None:
    helpful, harmless = read(
        {
            "prompt": "q",
            "response_0": "zero",
            "response_1": "one",
            "is_response_0_safe": False,
            "is_response_1_safe": True,
            "better_response_id": 0,
            "safer_response_id": 1,
        }
    )
    assert (helpful.dimension, helpful.response, helpful.rejected) == ("helpful", "zero", "one")
    assert (helpful.response_safe, helpful.rejected_safe) == (False, True)
    assert (harmless.dimension, harmless.response, harmless.rejected) == ("harmless", "one", "zero")
    assert (harmless.response_safe, harmless.rejected_safe) == (True, False)


def test_pairs_of_message_lists_are_read_with_the_prompt_beside_them_or_inside_them() -> None:
    other = {"role": "assistant", "content": "b"}
    inside = read({"chosen": [USER, ASSISTANT], "rejected": [USER, other]})
    beside = read({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [other]})
    repeated = read({"prompt": "q", "chosen": [USER, ASSISTANT], "rejected": [USER, other]})
    assert inside == beside == repeated == [Example((Message("user", "q"),), "a", "b")]


def test_messages_give_their_last_answer_or_a_prompt_up_to_the_users_last_turn() -> None:
    (answered,) = read({"messages": [USER, ASSISTANT, USER, ASSISTANT]})
    (open_ended,) = read({"messages": [USER, ASSISTANT, USER]})
    assert (len(answered.prompt), answered.response) == (3, "a")
    assert (len(open_ended.prompt), open_ended.response) == (3, None)
    with pytest.raises(LeftOut, match="does not end with an answer"):
        to_record(open_ended, "demonstrations", "helpful", "x:1")


def test_neighbouring_turns_of_one_speaker_become_one() -> None:
    turns = parse_transcript("\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nd", "here")
    assert turns == (Message("user", "a\n\nb"), Message("assistant", "c\n\nd"))


def test_a_prompt_written_as_an_open_transcript_becomes_turns_and_a_plain_one_stays() -> None:
    (row,) = read(
        {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "chosen": "d", "rejected": "e"}
    )
    assert [turn.role for turn in row.prompt] == ["user", "assistant", "user"]
    (plain,) = read("Human: is this a word?")
    assert plain.prompt == (Message("user", "Human: is this a word?"),)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a\r\nb\rc ", "a\nb\nc"),
        ("a\n\n \t\n\n  b", "a\n\n  b"),
        ("a\n\nb\nc", "a\n\nb\nc"),
        ("e\u0301", "\u00e9"),
        ("cut \ud83d", "cut \ufffd"),
    ],
)
def test_cleaning_keeps_the_text_and_tidies_white_space_and_unicode(text: str, clean: str) -> None:
    assert clean_text(text) == clean
    assert clean_text(clean) == clean


def test_an_empty_system_message_goes_and_an_empty_turn_leaves_the_row_out() -> None:
    empty_system = Example((Message("system", " "), Message("user", "q")), "a")
    assert to_record(empty_system, "demonstrations", "helpful", "x:1").prompt == (Message("user", "q"),)
    with pytest.raises(LeftOut, match="empty"):
        to_record(
            Example((Message("assistant", ""), Message("user", "q")), "a"), "demonstrations", "helpful", "x:1"
        )


def test_ids_ignore_the_spelling_of_the_prompt_and_notice_every_letter_of_the_response() -> None:
    def identify(prompt: str, response: str) -> str:
        return to_record(Example((Message("user", prompt),), response), "demonstrations", "helpful", "x:1").id

    assert identify("What  is it?", "this") == identify("what is IT?", "this")
    assert identify("What is it?", "this") != identify("What is it?", "This")


def test_shares_follow_the_weights_up_to_the_scarcest_source() -> None:
    # 10 rows at weight 0.3 allow 33.3 per unit of weight: 10 and floor(33.3 * 0.7) = 23.
    assert shares([10, 100], [0.3, 0.7]) == [10, 23]
    assert shares([40, 10, 99], [1, 1, 2]) == [10, 10, 20]
