"""Several processes joined by torch.distributed: gloo between CPUs, and nccl between GPUs beside it."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from components.errors import InputError
from components.ranks import Item, Result, State, rank, world_size
from components.termination import Watch

PATIENCE = timedelta(hours=2)
"""How long a process waits for another that lives: one may sample or write for so long. A dead one is noticed by what
started it, and at once by those that are connected to it."""
BUCKET = 1 << 25
"""Numbers that are added up at once: 128 MiB in float32."""


class Group:
    """Several processes, joined by torch.distributed."""

    def __init__(self) -> None:
        """Raises InputError where a machine has fewer GPUs than processes."""
        if not dist.is_initialized():
            if gpus := torch.cuda.device_count():
                torch.cuda.set_device(_own_gpu(gpus))
            backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        assert (self.size, self.rank) == (world_size(), rank()), "joined another group"

    def share(self, items: Sequence[Item]) -> list[tuple[Item, float]]:
        """Every size-th item from the rank-th on; who has fewer repeats the first of all items, for nothing."""
        own = [(item, 1.0) for item in items[self.rank :: self.size]]
        return own + [(items[0], 0.0)] * (-(-len(items) // self.size) - len(own))

    def spread(self, items: Sequence[Item], work: Callable[[Item], Result]) -> list[Result]:
        """What `work` makes of every item."""
        if not items:
            return []
        rows = self.gathered([work(item) for item, _ in self.share(items)])
        return [rows[number % self.size][number // self.size] for number in range(len(items))]

    def gathered(self, value: Result) -> list[Result]:
        """The value of every process, in their order."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, _on_cpu(value))
        return found

    def first(self, work: Callable[[], Result]) -> Result:
        """What `work` gives the first process."""
        found: list[Any] = [_on_cpu(work()) if self.rank == 0 else None]
        dist.broadcast_object_list(found)
        return found[0]  # type: ignore[no-any-return]

    def totals(self, sums: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """Sums and counts by name, added up; every process names the same."""
        table = torch.tensor(list(sums.values()), dtype=torch.float64)
        self.add_up([table])
        return {name: (value, count) for name, (value, count) in zip(sums, table.tolist(), strict=True)}

    def highest(self, value: float) -> float:
        """The largest of all processes' values."""
        return max(self.gathered(value))

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Make every tensor the sum of all processes', in place, many small ones at once."""
        for bucket in _buckets(tensors):
            _in_one_piece(bucket, dist.all_reduce)

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Make every tensor the first process's, in place."""
        for bucket in _buckets(tensors):
            _in_one_piece(bucket, lambda flat: dist.broadcast(flat, 0))

    def barrier(self) -> None:
        """Wait for all."""
        self.gathered(None)

    def asked(self, watch: Watch) -> bool:
        """Whether any process was asked to stop; then each of them is."""
        watch.requested = bool(self.highest(float(watch.requested)))
        return watch.requested

    @contextmanager
    def repeatable(self, watch: Watch, state: Callable[[], State], save: Callable[[State], None]) -> Iterator[None]:
        """SIGTERM is noted and breaks nothing off: each process would stop somewhere else, and wait for the others."""
        yield


def _own_gpu(gpus: int) -> int:
    """The GPU of this process. Raises InputError when there is none for it."""
    own = int(os.environ["LOCAL_RANK"])
    if own >= gpus:
        raise InputError(
            f"compute.processes starts process {own + 1} on a machine with {gpus} GPUs; each process needs one of its "
            "own. Set compute.processes to the GPUs of the task."
        )
    return own


def _on_cpu(value: Any) -> Any:
    """The value with its tensors on the CPU, where any process can read them."""
    match value:
        case torch.Tensor():
            return value.cpu()
        case dict():
            return {name: _on_cpu(inner) for name, inner in value.items()}
        case tuple() if hasattr(value, "_fields"):
            return type(value)(*map(_on_cpu, value))
        case list() | tuple():
            return type(value)(map(_on_cpu, value))
    if is_dataclass(value):
        return replace(value, **{item.name: _on_cpu(getattr(value, item.name)) for item in fields(value)})  # type: ignore[type-var]
    return value


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors, some of one dtype together, in their order."""
    bucket, held = list[Tensor](), 0
    for tensor in tensors:
        if bucket and (held + tensor.numel() > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.numel()
    if bucket:
        yield bucket


def _in_one_piece(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Do something to all of the tensors' numbers at once, in place."""
    with torch.no_grad():
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        collective(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
