"""How a batch is cut into minibatches and micro-batches."""

import pytest
import torch

from components.rl.types import Batch, micro_rows


def numbered_batch(rows: int, unit: int = 1, group: int = 1) -> Batch:
    """A batch in which every tensor names its row."""
    numbers = torch.arange(rows)[:, None].expand(rows, 2)
    return Batch(
        numbers,
        torch.ones(rows, 2, dtype=torch.bool),
        torch.ones(rows, 1, dtype=torch.bool),
        numbers[:, :1].float(),
        advantages=numbers[:, :1] * 10.0,
        returns=numbers[:, :1] * 100.0,
        unit=unit,
        group=group,
        metrics={"cost/lambda": 1.0},
    )


def row_numbers(batch: Batch) -> list[int]:
    return batch.input_ids[:, 0].tolist()


@pytest.mark.parametrize(
    ("rows", "unit", "size"), [(12, 1, 4), (12, 2, 4), (12, 2, 5), (10, 2, 4), (6, 3, 1), (7, 1, 3)]
)
def test_minibatches_hold_every_row_once_and_keep_units_together(rows: int, unit: int, size: int) -> None:
    batch = numbered_batch(rows, unit)
    parts = [batch.rows(index) for index in batch.plan(1, size, seed=0)]
    seen = [number for part in parts for number in row_numbers(part)]
    assert sorted(seen) == list(range(rows))
    for part in parts:
        numbers = row_numbers(part)
        assert len(part) <= max(size, unit)
        for start in range(0, len(numbers), unit):
            first = numbers[start]
            assert first % unit == 0
            assert numbers[start : start + unit] == list(range(first, first + unit))


@pytest.mark.parametrize(("size", "whole"), [(4, True), (8, True), (6, False), (2, False)])
def test_minibatches_that_can_hold_whole_groups_do(size: int, whole: bool) -> None:
    batch = numbered_batch(16, group=4)
    minibatches = batch.plan(2, size, seed=0)
    sizes = [len(rows) for rows in minibatches]
    assert sorted(torch.cat(minibatches).tolist()) == sorted([*range(16)] * 2)
    assert max(sizes) == size and len(sizes) == 2 * -(-16 // size)  # as many updates as without groups
    starts = [rows[place : place + 4].tolist() for rows in minibatches for place in range(0, len(rows), 4)]
    assert all(rows == list(range(rows[0], rows[0] + 4)) and rows[0] % 4 == 0 for rows in starts) is whole


def test_the_order_of_minibatches_depends_on_the_seed_alone() -> None:
    batch = numbered_batch(16)

    def order(seed: int) -> list[list[int]]:
        return [rows.tolist() for rows in batch.plan(1, 4, seed)]

    torch.manual_seed(3)
    first = order(1)
    torch.manual_seed(4)
    assert first == order(1) != order(2)


def test_micro_batches_hold_rows_of_like_length_within_the_room_of_full_rows() -> None:
    lengths = [8, 1, 2, 8, 3, 2]
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    # room for 2 rows of 8: 4 rows of 3 at most, and then the two of 8
    assert [rows.tolist() for rows in micro_rows(mask, 2, 1)] == [[1, 2, 5, 4], [0, 3]]
    # units of two: (8, 1), (2, 8) and (3, 2), of which the last two rows are the shortest
    assert [rows.tolist() for rows in micro_rows(mask, 2, 2)] == [[4, 5], [0, 1], [2, 3]]
    assert [rows.tolist() for rows in micro_rows(mask, 4, 2)] == [[4, 5, 0, 1], [2, 3]]


def test_groups_larger_than_a_micro_batch_are_parted_and_units_are_not() -> None:
    parts = [len(part) for part in numbered_batch(8, group=4).micro_batches(2)]
    assert parts == [2, 2, 2, 2]
    assert [len(part) for part in numbered_batch(8, group=4).micro_batches(5)] == [4, 4]
    assert [len(part) for part in numbered_batch(4, unit=2).micro_batches(1)] == [2, 2]


def test_micro_batches_keep_the_order_and_the_units() -> None:
    parts = list(numbered_batch(10, unit=2).micro_batches(5))
    assert [row_numbers(part) for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_rows_are_taken_from_every_tensor_and_nothing_else_changes() -> None:
    taken = numbered_batch(5).rows(torch.tensor([3, 1]))
    assert row_numbers(taken) == [3, 1]
    assert taken.advantages is not None and taken.advantages.flatten().tolist() == [30, 10]
    assert taken.returns is not None and taken.returns.flatten().tolist() == [300, 100]
    assert taken.values is None and taken.metrics == {"cost/lambda": 1.0}
