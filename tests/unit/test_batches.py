"""Batches by token budget."""

import random

import pytest

from components.batches import length_batches, token_batches

LENGTHS = random.Random(0).choices(range(1, 61), k=200)


def padded_tokens(batch: list[int]) -> int:
    return len(batch) * max(LENGTHS[index] for index in batch)


@pytest.mark.parametrize("budget", [60, 128, 1000])
def test_every_row_comes_once_and_no_batch_passes_the_budget(budget: int) -> None:
    for batches in (token_batches(LENGTHS, budget, seed=3), length_batches(LENGTHS, budget)):
        assert sorted(index for batch in batches for index in batch) == list(range(len(LENGTHS)))
        assert all(padded_tokens(batch) <= budget for batch in batches)


def test_little_of_a_batch_is_padding() -> None:
    batches = token_batches(LENGTHS, 256, seed=0)
    assert sum(LENGTHS) / sum(map(padded_tokens, batches)) > 0.9


def test_a_row_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    assert length_batches([5, 100, 5], budget=16) == [[0, 2], [1]]


def test_the_order_depends_on_the_seed_alone() -> None:
    assert token_batches(LENGTHS, 128, seed=1) == token_batches(LENGTHS, 128, seed=1)
    assert token_batches(LENGTHS, 128, seed=1) != token_batches(LENGTHS, 128, seed=2)


def test_rows_of_one_length_have_other_batch_mates_in_another_epoch() -> None:
    first, second = (token_batches([8] * 40, 64, seed) for seed in (0, 1))
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}


def test_batches_do_not_come_in_order_of_length() -> None:
    longest = [max(LENGTHS[index] for index in batch) for batch in token_batches(LENGTHS, 128, seed=0)]
    assert longest != sorted(longest)


def test_no_rows_make_no_batches() -> None:
    assert token_batches([], 64, seed=0) == length_batches([], 64) == []
