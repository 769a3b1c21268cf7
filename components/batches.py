"""Batches by token budget: rows of like length together, so that little of a batch is padding."""

import random
from collections.abc import Iterable, Sequence


def token_batches(lengths: Sequence[int], budget: int, seed: int) -> list[list[int]]:
    """Row numbers in batches within `budget` tokens, shuffled.

    Rows are shuffled before they are sorted by length, so that the batches of one length differ from seed to
    seed; the batches come in random order.
    """
    generator = random.Random(seed)
    order = list(range(len(lengths)))
    generator.shuffle(order)
    batches = _cut(sorted(order, key=lambda index: lengths[index]), lengths, budget)
    generator.shuffle(batches)
    return batches


def length_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Row numbers in batches within `budget` tokens, shortest rows first: for evaluation."""
    return _cut(sorted(range(len(lengths)), key=lambda index: lengths[index]), lengths, budget)


def unit_batches(lengths: Sequence[int], unit: int, budget: int) -> list[list[int]]:
    """Row numbers in batches within `budget` tokens, where every `unit` rows in a row stay together; short ones first.

    The last unit may have fewer rows.
    """
    whole = [unit * max(lengths[start : start + unit]) for start in range(0, len(lengths), unit)]
    return [
        [row for number in numbers for row in range(number * unit, min((number + 1) * unit, len(lengths)))]
        for numbers in length_batches(whole, budget)
    ]


def _cut(order: Iterable[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut rows in ascending length where the padded size (rows times longest row) would pass the budget.

    A row longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[index] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
