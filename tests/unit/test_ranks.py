"""What several processes tell one another, with threads in their place: who works on what, and what all of them get."""

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from components import group
from components.errors import InputError
from components.group import Group, _buckets, _in_one_piece, _on_cpu, _own_gpu
from components.ranks import ALONE, is_first, is_started, join
from components.termination import Terminated, Watch
from threaded import in_threads


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_item_is_somebody_s_and_all_make_equally_many_passes(size: int) -> None:
    items = list("abcdefg")
    shares = in_threads(size, lambda ranks: ranks.share(items))
    assert sorted(item for share in shares for item, weight in share if weight == 1) == items
    assert {len(share) for share in shares} == {-(-len(items) // size)}
    assert {item for share in shares for item, weight in share if weight == 0} <= {"a"}


@pytest.mark.parametrize("items", [[], [3], [3, 1, 2], [5, 4, 3, 2, 1, 0]])
def test_all_get_the_results_of_all_in_order_each_made_once(items: list[int]) -> None:
    made, lock = list[int](), threading.Lock()

    def work(item: int) -> int:
        with lock:
            made.append(item)
        return 10 * item

    found = in_threads(2, lambda ranks: ranks.spread(items, work))
    assert found == [[10 * item for item in items]] * 2
    assert sorted(set(made)) == sorted(items) and len(made) == 2 * -(-len(items) // 2)


def test_only_the_first_does_what_the_first_alone_does() -> None:
    done = list[int]()

    def work(rank: int) -> str:
        done.append(rank)
        return f"by {rank}"

    assert in_threads(3, lambda ranks: ranks.first(lambda: work(ranks.rank))) == ["by 0"] * 3
    assert done == [0]


def test_sums_and_counts_are_added_up_and_the_highest_is_everybody_s() -> None:
    def told(ranks: Group) -> Any:
        return ranks.totals({"a": (ranks.rank + 1.0, 2.0), "b": (0.5, 0.0)}), ranks.highest(float(ranks.rank))

    assert in_threads(2, told) == [({"a": (3.0, 4.0), "b": (1.0, 0.0)}, 1.0)] * 2


def test_one_that_is_asked_to_stop_stops_all() -> None:
    def asked(ranks: Group) -> tuple[bool, bool]:
        watch = Watch()
        watch.requested = ranks.rank == 1
        return ranks.asked(watch), watch.requested

    assert in_threads(2, asked) == [(True, True)] * 2
    assert in_threads(2, lambda ranks: ranks.asked(Watch())) == [False, False]


def test_several_processes_break_nothing_off_and_one_keeps_what_was_before() -> None:
    saved: list[str] = []

    def interrupted(ranks: Any) -> bool:
        watch = Watch()
        with ranks.repeatable(watch, lambda: "before", saved.append):
            watch.requested = True
            watch._asked(15, None)
        return True

    assert in_threads(2, interrupted) == [True, True] and saved == []
    with pytest.raises(Terminated):
        interrupted(ALONE)
    assert saved == ["before"]


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Record:
    tensor: Any
    name: str


def test_tensors_travel_by_way_of_the_cpu_in_whatever_they_lie() -> None:
    def given() -> torch.Tensor:
        return torch.ones(2, device="meta")

    with pytest.raises(NotImplementedError):  # a tensor without data cannot be copied: so it was tried
        _on_cpu({"a": [Pair(1, given())]})
    value = {"a": [Pair(torch.ones(1), "x")], "b": (Record(torch.zeros(2), "n"), None, 3.0)}
    copied = _on_cpu(value)
    assert copied["a"][0] == Pair(torch.ones(1), "x") and isinstance(copied["a"][0], Pair)
    assert copied["b"][0].name == "n" and copied["b"][1:] == (None, 3.0)


def test_small_tensors_are_added_up_together_and_large_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "BUCKET", 5)
    tensors = [torch.full((n,), float(n)) for n in (2, 2, 2, 9, 1)] + [torch.ones(1, dtype=torch.float64)]
    assert [[len(tensor) for tensor in bucket] for bucket in _buckets(tensors)] == [[2, 2], [2], [9], [1], [1]]
    seen: list[int] = []

    def doubled(flat: torch.Tensor) -> None:
        seen.append(len(flat))
        flat.mul_(2)

    matrix, vector = torch.ones(2, 3), torch.ones(4, requires_grad=True)
    _in_one_piece([matrix, vector], doubled)
    assert seen == [10] and matrix.tolist() == [[2.0] * 3] * 2 and vector.tolist() == [2.0] * 4


def test_the_environment_says_who_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert is_first() and not is_started() and join() is ALONE
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert is_started() and not is_first() and join() is ALONE


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert _own_gpu(3) == 2
    with pytest.raises(InputError, match=r"process 3 on a machine with 2 GPUs.*compute\.processes"):
        _own_gpu(2)
