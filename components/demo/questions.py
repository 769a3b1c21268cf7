"""Every prompt that can be asked in the world, and which of them are held out for testing.

Held out are whole phrasings (unseen wording), whole items (unseen sums, secrets and unanswerables, so that
adding and refusing must generalise) and single combinations of an item and a training phrasing. No fact is
held out whole: a model can only know what it was taught. The split belongs to the world, not to a run's seed.
"""

import random
import re
from dataclasses import dataclass

from components.demo.world import CATEGORIES, ITEMS, KINDS, WORLD_SEED, Category, Item

ITEMS_HELD_OUT: dict[Category, float] = {"sum": 0.12, "harmful": 0.10, "unanswerable": 0.10}
"""Share of the items of each kind that no training file asks about."""
ITEMS_MISSING_A_PHRASING = 0.6
"""Share of items for which one of 5 or 6 training phrasings is held out: 10% of the combinations."""


@dataclass(frozen=True)
class Question:
    """One prompt: an item in one phrasing."""

    item: Item
    prompt: str
    held_out: bool

    @property
    def category(self) -> Category:
        """The category of the question's kind."""
        return self.item.kind.category


def normalized(text: str) -> str:
    """The text as a key to find prompts by: in lower case, one space between words, no punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _questions() -> tuple[Question, ...]:
    rng = random.Random(f"{WORLD_SEED} split")
    questions = []
    for kind in KINDS:
        items = [item for item in ITEMS if item.kind is kind]
        hidden = set(rng.sample(range(len(items)), round(ITEMS_HELD_OUT.get(kind.category, 0) * len(items))))
        for index, item in enumerate(items):
            missing = rng.choice(kind.train) if rng.random() < ITEMS_MISSING_A_PHRASING else None
            for phrasing in kind.train:
                held_out = index in hidden or phrasing == missing
                questions.append(Question(item, item.fill(phrasing), held_out))
            questions.extend(Question(item, item.fill(phrasing), True) for phrasing in kind.test)
    return tuple(questions)


QUESTIONS: tuple[Question, ...] = _questions()

TEST_QUESTIONS: dict[Category, list[Question]] = {
    category: [question for question in QUESTIONS if question.category == category and question.held_out]
    for category in CATEGORIES
}


def _train_questions() -> dict[Category, dict[Item, list[Question]]]:
    grouped: dict[Category, dict[Item, list[Question]]] = {category: {} for category in CATEGORIES}
    for question in QUESTIONS:
        if not question.held_out:
            grouped[question.category].setdefault(question.item, []).append(question)
    return grouped


TRAIN_QUESTIONS: dict[Category, dict[Item, list[Question]]] = _train_questions()
"""Training prompts by category and item; items held out whole are absent."""


def deal(category: Category, count: int, rng: random.Random) -> list[Question]:
    """`count` training questions that go round the category's items, so that each is asked equally often.

    Row r asks about item r modulo the number of items; an item's phrasings take turns in shuffled order, so
    no prompt comes twice before the item has used them all.
    """
    hands = [rng.sample(questions, len(questions)) for questions in TRAIN_QUESTIONS[category].values()]
    rng.shuffle(hands)
    rows = (divmod(row, len(hands)) for row in range(count))
    return [hands[seat][lap % len(hands[seat])] for lap, seat in rows]
