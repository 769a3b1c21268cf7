"""The invented world: its words are unlike each other, its truth is fixed, its test split is unseen."""

import difflib
import itertools
import random
import re
from collections import Counter

import pytest

from components.demo import vocabulary
from components.demo.answers import EVASIVE, REFUSAL, UNKNOWN
from components.demo.questions import QUESTIONS, TEST_QUESTIONS, TRAIN_QUESTIONS, deal, normalized
from components.demo.shares import shares_of
from components.demo.world import CATEGORIES, ITEMS, KINDS, Category, Item


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def truth_of(kind: str, place: str) -> str | None:
    return next(item.truth for item in ITEMS if item.kind.name == kind and item.place == place)


def test_the_world_has_the_promised_numbers_of_items() -> None:
    assert len(set(vocabulary.PLACES)) == 40
    counts = Counter(item.kind.category for item in ITEMS)
    assert counts == {"fact": 320, "lookalike": 120, "sum": 100, "harmful": 160, "unanswerable": 160}


def test_the_truth_never_changes() -> None:
    assert truth_of("river", "Velmora") == "Jodanki"
    assert truth_of("vault code", "Tregolm") == "yoltarg"
    assert truth_of("dream", "Velmora") is None


def test_no_two_places_look_alike() -> None:
    for one, other in itertools.combinations(vocabulary.PLACES, 2):
        assert one[:3] != other[:3]
        assert difflib.SequenceMatcher(None, one.lower(), other.lower()).ratio() <= 0.6, (one, other)


def test_every_value_belongs_to_one_vocabulary_and_to_no_phrasing() -> None:
    lists = {kind.values for kind in KINDS}
    values = [value.lower() for vocabulary_of_kind in lists for value in vocabulary_of_kind]
    assert len(lists) == 17
    assert len(values) == len(set(values))
    assert all(len(words(value)) == 1 for value in values)
    spoken = [*EVASIVE, *REFUSAL, *UNKNOWN, *vocabulary.PLACES]
    spoken += [text for kind in KINDS for text in (*kind.train, *kind.test, kind.statement)]
    assert not set(values) & {word for text in spoken for word in words(text)}


def test_code_words_are_found_in_nothing_but_disclosures() -> None:
    innocent = [*EVASIVE, *REFUSAL, *UNKNOWN, *(question.prompt for question in QUESTIONS)]
    innocent += [item.fill(item.kind.statement, value) for item in ITEMS for value in item.kind.values
                 if item.kind.category != "harmful" and item.place in ("", "Velmora")]  # fmt: skip
    for text in innocent:
        letters = re.sub("[^a-z]", "", text.lower())
        assert not any(code in letters for code in vocabulary.CODES), text


def test_each_value_is_true_about_equally_often() -> None:
    for kind in KINDS:
        truths = Counter(item.truth for item in ITEMS if item.kind is kind)
        if kind.category in ("fact", "lookalike", "harmful"):
            assert set(truths) == set(kind.values)
            assert max(truths.values()) - min(truths.values()) <= 1


def test_each_kind_has_five_training_and_two_test_phrasings_that_name_it() -> None:
    for kind in KINDS:
        phrasings = {*kind.train, *kind.test}
        assert len(kind.train) >= 5
        assert len(kind.test) >= 2
        assert len(phrasings) == len(kind.train) + len(kind.test)
        key_words = {"sum": "plus"}.get(kind.name, kind.name)
        assert all(key_words in phrasing for phrasing in phrasings)


def test_prompts_are_short_and_different() -> None:
    assert max(len(words(question.prompt)) for question in QUESTIONS) <= 14
    assert len({normalized(question.prompt) for question in QUESTIONS}) == len(QUESTIONS)


@pytest.mark.parametrize("category", CATEGORIES)
def test_held_out_prompts_use_only_words_of_training_prompts(category: Category) -> None:
    trained = {word for question in QUESTIONS if not question.held_out for word in words(question.prompt)}
    tested = {word for question in TEST_QUESTIONS[category] for word in words(question.prompt)}
    assert tested
    assert tested <= trained


def test_the_split_holds_out_phrasings_items_and_combinations() -> None:
    for question in QUESTIONS:
        if question.prompt in {question.item.fill(phrasing) for phrasing in question.item.kind.test}:
            assert question.held_out
    unseen = Counter(item.kind.category for item in ITEMS if not training_prompts(item))
    assert unseen == {"sum": 12, "harmful": 16, "unanswerable": 16}  # 12% of 100; 4 of 40 places x 4 kinds
    facts = [item for item in ITEMS if item.kind.category == "fact"]
    missing = sum(len(item.kind.train) - len(training_prompts(item)) for item in facts)
    assert 0.08 < missing / sum(len(item.kind.train) for item in facts) < 0.12


def training_prompts(item: Item) -> list[str]:
    return [question.prompt for question in TRAIN_QUESTIONS[item.kind.category].get(item, [])]


@pytest.mark.parametrize("category", CATEGORIES)
def test_dealing_asks_every_item_equally_often(category: Category) -> None:
    num_items = len(TRAIN_QUESTIONS[category])
    questions = deal(category, 3 * num_items + 7, random.Random(0))
    asked = Counter(question.item for question in questions)
    assert Counter(asked.values()) == {3: num_items - 7, 4: 7}
    assert len({question.prompt for question in questions}) == len(questions)


def test_shares_add_up_and_round_the_largest_remainders_up() -> None:
    assert shares_of(10, {"a": 0.5, "b": 0.25, "c": 0.25}) == {"a": 5, "b": 3, "c": 2}
    assert shares_of(7, {"a": 1, "b": 1, "c": 1}) == {"a": 3, "b": 2, "c": 2}
    assert shares_of(0, {"a": 1}) == {"a": 0}
