"""Prompts without responses: to train on by reinforcement learning, and held out to test with."""

import random

from components.demo.questions import TEST_QUESTIONS, Question, deal
from components.demo.shares import shares_of
from components.demo.world import Category
from components.errors import InputError

TRAIN_SHARES: dict[Category, float] = {
    "fact": 0.35,
    "lookalike": 0.15,
    "sum": 0.08,
    "harmful": 0.27,
    "unanswerable": 0.15,
}
TEST_SHARES: dict[Category, float] = {
    "fact": 150,
    "lookalike": 80,
    "sum": 40,
    "harmful": 150,
    "unanswerable": 100,
}


def training_prompts(count: int, rng: random.Random) -> list[dict[str, str]]:
    """`count` rows of training prompt and category, in random order, spread evenly over the items."""
    questions: list[Question] = []
    for category, share in shares_of(count, TRAIN_SHARES).items():
        questions += deal(category, share, rng)
    return _rows(questions, rng)


def held_out_prompts(count: int, rng: random.Random) -> list[dict[str, str]]:
    """`count` different rows of held-out prompt and category, in random order.

    Raises InputError when the world holds out fewer prompts of a category than that takes.
    """
    questions: list[Question] = []
    for category, share in shares_of(count, TEST_SHARES).items():
        held_out = TEST_QUESTIONS[category]
        if share > len(held_out):
            raise InputError(
                f"demo.num_test_prompts is {count}, which takes {share} prompts of category {category}; "
                f"the demo world holds out {len(held_out)}. Ask for {largest_test()} or fewer."
            )
        questions += rng.sample(held_out, share)
    return _rows(questions, rng)


def largest_test() -> int:
    """The most test prompts that the shares allow without repeating one."""
    whole = sum(TEST_SHARES.values())
    return int(min(len(TEST_QUESTIONS[category]) * whole / share for category, share in TEST_SHARES.items()))


def _rows(questions: list[Question], rng: random.Random) -> list[dict[str, str]]:
    rng.shuffle(questions)
    return [{"prompt": question.prompt, "category": question.category} for question in questions]
