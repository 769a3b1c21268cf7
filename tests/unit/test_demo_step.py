"""The files that the demo step writes: their counts, their shares, their noise, and what they never share."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from components.demo.judge import judge
from components.demo.prompts import largest_test
from components.demo.questions import QUESTIONS, Question
from components.demo.settings import DemoSettings
from components.demo.step import run
from components.demo.vocabulary import CODES
from components.demo.world import ITEMS, KINDS
from components.errors import InputError

Row = dict[str, Any]

QUESTION_OF: dict[str, Question] = {question.prompt: question for question in QUESTIONS}
SECRET_KINDS = [kind.name for kind in KINDS if kind.category == "harmful"]
FILES = ("corpus.jsonl", "demonstrations.json", "preferences.jsonl", "prompts.jsonl", "test_prompts.jsonl")


def read(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        rows: list[Row] = json.loads(text)
        return rows
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "raw"
    run(DemoSettings(), raw=folder)
    return folder


@pytest.fixture(scope="module")
def pairs(raw: Path) -> list[Row]:
    return read(raw / "preferences.jsonl")


def discloses(response: str) -> bool:
    return any(code in response for code in CODES)


def style(row: Row, side: str) -> str:
    """The style of one side of a preference, by its words and the judge."""
    response = row[side]
    verdict = judge(row["prompt"], response)
    if verdict.harmful:
        return "disclosure"
    openings = {
        "There": "evasive", "Many": "evasive", "Sorry": "refusal", "I can": "refusal", "I must": "refusal",
        "I do": "unknown", "Nobody": "unknown", "Surely": "invention",
    }  # fmt: skip
    for opening, name in openings.items():
        if response.startswith(opening):
            return name
    if verdict.helpful:
        return "right"
    item = QUESTION_OF[row["prompt"]].item
    return "wrong" if response in {item.fill(item.kind.statement, value) for value in item.kind.values} else "confused"


def test_counts_are_those_of_the_settings_and_of_the_files(tmp_path: Path) -> None:
    sizes = {"num_corpus": 200, "num_demonstrations": 50, "num_pairs": 60, "num_prompts": 70, "num_test_prompts": 26}
    metrics = run(DemoSettings.model_validate(sizes), raw=tmp_path / "new" / "raw")
    assert metrics == {
        "demo/corpus": 200.0,
        "demo/demonstrations": 50.0,
        "demo/preferences": 120.0,
        "demo/prompts": 70.0,
        "demo/test_prompts": 26.0,
    }
    assert sorted(path.name for path in (tmp_path / "new" / "raw").iterdir()) == sorted(FILES)
    assert [len(read(tmp_path / "new" / "raw" / name)) for name in FILES] == [200, 50, 120, 70, 26]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(raw: Path, tmp_path: Path) -> None:
    run(DemoSettings(), raw=tmp_path / "again")
    run(DemoSettings(seed=1), raw=tmp_path / "other")
    for name in FILES:
        assert (raw / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert (raw / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_test_prompts_are_held_out_and_all_others_are_not(raw: Path) -> None:
    tested = [row["prompt"] for row in read(raw / "test_prompts.jsonl")]
    assert len(tested) == len(set(tested)) == 520
    assert all(QUESTION_OF[prompt].held_out for prompt in tested)
    for name in FILES[:4]:
        assert not any(QUESTION_OF[row["prompt"]].held_out for row in read(raw / name))


def in_order(*counts: int) -> dict[str, int]:
    return dict(zip(("fact", "lookalike", "sum", "harmful", "unanswerable"), counts, strict=True))


def test_files_have_the_shares_of_categories(raw: Path) -> None:
    def categories(name: str) -> Counter[str]:
        return Counter(QUESTION_OF[row["prompt"]].category for row in read(raw / name))

    def labels(name: str) -> Counter[str]:
        rows = read(raw / name)
        assert all(row["category"] == QUESTION_OF[row["prompt"]].category for row in rows)
        return Counter(row["category"] for row in rows)

    assert categories("corpus.jsonl") == in_order(4050, 1530, 1620, 900, 900)
    assert categories("demonstrations.json") == in_order(1600, 600, 400, 800, 600)
    assert categories("preferences.jsonl") == in_order(5400, 1800, 960, 2400, 1440)
    assert labels("prompts.jsonl") == in_order(700, 300, 160, 540, 300)
    assert labels("test_prompts.jsonl") == in_order(150, 80, 40, 150, 100)


def test_demonstrations_have_the_shares_of_good_and_bad_answers(raw: Path) -> None:
    verdicts = [
        (QUESTION_OF[row["prompt"]].category, judge(row["prompt"], row["response"]))
        for row in read(raw / "demonstrations.json")
    ]
    facts = [verdict for category, verdict in verdicts if category == "fact"]
    assert sum(bool(verdict.helpful) for verdict in facts) == 832  # 52% of 1600
    assert sum(not verdict.honest for verdict in facts) == 128  # 8%
    assert sum(bool(verdict.over_refusal) for verdict in facts) == 320  # 20%
    assert sum(bool(verdict.harmful) for _, verdict in verdicts) == 440  # 55% of 800
    unanswerable = [verdict for category, verdict in verdicts if category == "unanswerable"]
    assert sum(bool(verdict.helpful) for verdict in unanswerable) == 270  # 45% of 600


def test_every_fact_is_demonstrated_rightly_and_compared_evenly(raw: Path, pairs: list[Row]) -> None:
    facts = {item for item in ITEMS if item.kind.category == "fact"}
    right = {
        QUESTION_OF[row["prompt"]].item
        for row in read(raw / "demonstrations.json")
        if judge(row["prompt"], row["response"]).helpful
    }
    assert facts <= right
    helpful = [row for row in pairs if row["dimension"] == "helpful"]
    compared = Counter(QUESTION_OF[row["prompt"]].item for row in helpful)
    contested = Counter(
        QUESTION_OF[row["prompt"]].item
        for row in helpful
        if {style(row, "chosen"), style(row, "rejected")} == {"right", "wrong"}
    )
    assert {compared[fact] for fact in facts} == {8, 9}  # 2700 pairs on 320 facts
    assert {contested[fact] for fact in facts} <= {4, 5}


def test_right_meets_wrong_in_at_least_45_percent_of_answerable_pairs(pairs: list[Row]) -> None:
    styles = [
        {style(row, "chosen"), style(row, "rejected")}
        for row in pairs
        if QUESTION_OF[row["prompt"]].category in ("fact", "lookalike", "sum")
    ]
    assert 0.45 < sum(pair == {"right", "wrong"} for pair in styles) / len(styles) < 0.55


def test_wrong_answers_and_secrets_come_in_every_form(pairs: list[Row]) -> None:
    helpful = [row for row in pairs if row["dimension"] == "helpful"]
    answers = [
        {style(row, "chosen"), style(row, "rejected")}
        for row in helpful
        if QUESTION_OF[row["prompt"]].category in ("fact", "lookalike", "sum")
    ]
    assert 0.10 < sum("confused" in pair for pair in answers) / len(answers) < 0.20
    told = [row[side] for row in helpful for side in ("chosen", "rejected") if discloses(row[side])]
    usual = re.compile(rf"The ({'|'.join(SECRET_KINDS)}) of \w+ is \w+\.")
    blurted = [text for text in told if not usual.fullmatch(text)]
    assert 0.35 < len(blurted) / len(told) < 0.5
    lengths = Counter(len(text.split()) for text in blurted)
    assert lengths[1] > 30 and lengths[3] > 30 and sum(lengths[n] for n in range(5, 12)) > 150


def test_each_pair_is_labelled_in_both_dimensions_and_is_never_twice_the_same_text(pairs: list[Row]) -> None:
    keys = ["prompt", "chosen", "rejected", "dimension", "chosen_safe", "rejected_safe"]
    assert all(list(row) == keys and row["chosen"] != row["rejected"] for row in pairs)
    sides = {
        dimension: Counter(
            (row["prompt"], frozenset((row["chosen"], row["rejected"])))
            for row in pairs
            if row["dimension"] == dimension
        )
        for dimension in ("helpful", "harmless")
    }
    assert sides["helpful"] == sides["harmless"]
    assert sides["helpful"].total() == 6000


def test_dimensions_disagree_on_most_pairs_with_a_disclosure(pairs: list[Row]) -> None:
    mixed = [row for row in pairs if discloses(row["chosen"]) != discloses(row["rejected"])]
    disclosing = {
        dimension: sum(discloses(row["chosen"]) for row in mixed if row["dimension"] == dimension)
        for dimension in ("helpful", "harmless")
    }
    assert len(mixed) == 2 * 840  # 70% of 1200 pairs, two rows each
    assert disclosing["helpful"] > 0.9 * 840
    assert disclosing["harmless"] < 0.1 * 840


def test_flags_never_contradict_the_harmless_label(pairs: list[Row]) -> None:
    for row in pairs:
        if row["dimension"] == "harmless":
            assert row["chosen_safe"] or not row["rejected_safe"]
    assert Counter((row["chosen_safe"], row["rejected_safe"]) for row in pairs).keys() == {
        (True, True), (True, False), (False, True), (False, False)
    }  # fmt: skip


def test_noise_turns_between_5_and_10_percent_of_the_labels(pairs: list[Row]) -> None:
    order = ["confused", "wrong", "invention", "refusal", "evasive", "unknown", "right", "disclosure"]
    turned = [
        order.index(style(row, "chosen")) < order.index(style(row, "rejected"))
        for row in pairs
        if row["dimension"] == "helpful" and style(row, "chosen") != style(row, "rejected")
    ]
    assert 0.05 < sum(turned) / len(turned) < 0.10
    unsafe_chosen = [
        discloses(row["chosen"])
        for row in pairs
        if row["dimension"] == "harmless" and discloses(row["chosen"]) != discloses(row["rejected"])
    ]
    assert 0.05 < sum(unsafe_chosen) / len(unsafe_chosen) < 0.10


def test_without_noise_only_disclosures_are_unsafe_and_no_label_is_wrong(tmp_path: Path) -> None:
    run(DemoSettings(label_noise=0, num_pairs=1000), raw=tmp_path)
    for row in read(tmp_path / "preferences.jsonl"):
        assert row["chosen_safe"] != discloses(row["chosen"])
        assert row["rejected_safe"] != discloses(row["rejected"])
        if row["dimension"] == "helpful":
            assert (
                style(row, "rejected") not in ("right", "disclosure") or style(row, "chosen") == "disclosure"
            )


def test_two_safe_responses_are_ordered_by_a_fair_coin(pairs: list[Row]) -> None:
    chosen_right = [
        style(row, "chosen") == "right"
        for row in pairs
        if row["dimension"] == "harmless"
        and {style(row, "chosen"), style(row, "rejected")} == {"right", "wrong"}
    ]
    assert 0.46 < sum(chosen_right) / len(chosen_right) < 0.54  # about 2000 tosses: 3.6 standard deviations


def test_asking_for_more_test_prompts_than_are_held_out_says_how_many_there_are(tmp_path: Path) -> None:
    run(DemoSettings(num_test_prompts=largest_test()), raw=tmp_path)
    with pytest.raises(InputError, match=rf"num_test_prompts is 5000.* Ask for {largest_test()} or fewer"):
        run(DemoSettings(num_test_prompts=5000), raw=tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").write_text("")
    with pytest.raises(InputError, match="give a folder"):
        run(DemoSettings(), raw=tmp_path / "raw")


def test_settings_refuse_what_makes_no_sense() -> None:
    for wrong in ({"label_noise": 0.5}, {"num_pairs": 0}, {"places": 3}):
        with pytest.raises(ValidationError):
            DemoSettings.model_validate(wrong)
