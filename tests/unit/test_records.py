"""Rows and folders: what they hold, and how they explain what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from components.artifacts import (
    MANIFEST,
    DataDir,
    content_digest,
    folder_digest,
    read_json,
    read_manifest,
    verify_manifest,
    write_json,
    write_manifest,
)
from components.errors import InputError
from components.records import (
    Demonstration,
    Message,
    Preference,
    Prompt,
    content_id,
    normalized,
    parse_prompt,
    prompt_text,
    to_row,
)

PROMPT = (Message("system", "be kind"), Message("user", "say rëd 🙂"))
RECORDS: list[Any] = [
    Demonstration("1", PROMPT, "red", "file:1"),
    Preference("2", PROMPT, "red", "blue", "harmless", True, None, "file:2"),
    Prompt("3", PROMPT, "file:3", "fact"),
    Prompt("4", PROMPT, "file:4"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_is_the_same_after_a_row_of_json(record: Any) -> None:
    assert type(record).from_row(json.loads(json.dumps(to_row(record))), "here") == record


def test_a_data_folder_gives_back_its_records_and_names_its_rows(tmp_path: Path) -> None:
    records = {("demonstrations", "train"): RECORDS[:1], ("preferences", "test"): RECORDS[1:2]}
    data = DataDir.write(tmp_path / "data", {**records, ("prompts", "train"): RECORDS[2:]}, {"seed": 1}, {})
    assert data.demonstrations("train") == RECORDS[:1] and data.demonstrations("test") == []
    assert data.preferences("test") == RECORDS[1:2] and data.prompts("train") == RECORDS[2:]
    assert [where for where, _ in data.rows("prompts", "train")] == [
        "prompts/train row 1 (file:3)",
        "prompts/train row 2 (file:4)",
    ]
    assert read_manifest(data.path)["counts"]["prompts/train"] == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chosen": None}, "row 7: field 'chosen' is missing; accepted: a string."),
        ({"chosen": 3}, r"row 7: field 'chosen' is 3 \(int\); accepted: a string."),
        ({"dimension": "kind"}, "row 7: field 'dimension' is 'kind'; accepted: helpful, harmless."),
        ({"chosen_safe": "yes"}, "field 'chosen_safe' is 'yes'; accepted: true, false, or absent."),
        ({"prompt": None}, "field 'prompt' is missing; accepted: a string or a list of messages."),
        ({"prompt": 5}, "field 'prompt' is 5; accepted"),
        (
            {"prompt": [{"role": "bot", "content": "x"}]},
            "has a turn .*'bot'.* accepted: .*system, user, assistant",
        ),
        ({"prompt": [{"role": "user"}]}, "field 'content' is missing"),
    ],
)
def test_a_row_that_does_not_fit_names_itself_the_field_and_what_is_accepted(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Preference.from_row(to_row(RECORDS[1]) | fields, "row 7")


def test_a_string_is_one_user_message() -> None:
    prompt = parse_prompt({"prompt": "say red"}, "here")
    assert prompt == (Message("user", "say red"),) and prompt_text(prompt) == "say red"
    assert prompt_text(PROMPT) == "system: be kind\nuser: say rëd 🙂"


def test_prompts_are_compared_without_case_or_white_space_but_with_roles() -> None:
    first, second = (parse_prompt({"prompt": text}, "here") for text in ("Say  RED\n", "say red"))
    assert normalized(first) == normalized(second)
    assert normalized((Message("system", "say red"),)) != normalized(second)
    assert content_id("ab", "c") != content_id("a", "bc")


def test_a_digest_depends_on_content_and_names_alone(tmp_path: Path) -> None:
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(content)
    assert folder_digest(tmp_path / "a") == folder_digest(tmp_path / "b") != folder_digest(tmp_path / "c")
    before = content_digest(tmp_path / "a")[1]
    assert write_manifest(tmp_path / "a", "data", parents={"raw": tmp_path / "c"}) == before
    assert folder_digest(tmp_path / "a") == verify_manifest(tmp_path / "a") == before
    assert read_manifest(tmp_path / "a")["parents"] == {"raw": folder_digest(tmp_path / "c")}


def test_an_altered_added_or_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("kept", "altered", "removed"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path, "data")
    (tmp_path / "altered").write_text("other")
    (tmp_path / "removed").unlink()
    (tmp_path / "added").write_text("new")
    with pytest.raises(InputError, match="differs from its manifest in added, altered, removed;"):
        verify_manifest(tmp_path)


def test_a_manifest_of_another_schema_is_an_error(tmp_path: Path) -> None:
    write_json(tmp_path / MANIFEST, {"schema_version": 99})
    with pytest.raises(InputError, match="schema_version is 99; this version of plumbline reads 1"):
        read_manifest(tmp_path)


def test_json_that_is_missing_or_broken_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for name, message in (("absent.json", "no such file"), ("broken.json", "not JSON")):
        with pytest.raises(InputError, match=f"{name}: {message}"):
            read_json(tmp_path / name)


def test_a_folder_that_is_no_data_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a data folder. Run preprocess first"):
        DataDir(tmp_path).demonstrations("train")
