"""Weights that lie in parts over several processes (ZeRO-3), brought together for what reads or changes them directly.

Forward passes need nothing of this: ZeRO's hooks bring a layer together while it computes. All processes enter what is
here together, with the same weights. What is in one piece anyway stays as it is.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from components.ranks import is_first

HELD = "held as a whole"
"""Among what uses a parameter, so that no forward pass gives it back meanwhile."""


@contextmanager
def gathered(parameters: Iterable[Any], *, changed: bool = False) -> Iterator[None]:
    """Some parameters in full. Changes are lost, unless they are said to be `changed`: then the first's stay."""
    parted = [parameter for parameter in parameters if is_parted(parameter)]
    if not parted:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parted, modifier_rank=0 if changed else None):
        yield


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """All weights of a module in full, held on every process's device: what takes most memory of all.

    Forward passes inside need no other process. Changes are lost.
    """
    parted: list[Any] = [p for p in module.parameters() if HELD not in getattr(p, "ds_active_sub_modules", (HELD,))]
    if not parted:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parted):
        for parameter in parted:
            parameter.ds_active_sub_modules.add(HELD)
        try:
            yield
        finally:
            for parameter in parted:
                parameter.ds_active_sub_modules.discard(HELD)


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in full on the CPU, one gathered after the other; in the first process alone, the others have none.

    Names of one tensor are names of one copy. What lies on the CPU in one piece is not copied.
    """
    found: dict[str, Tensor] = {}
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    for its_names in names.values():
        tensor = tensors[its_names[0]]
        parted = is_parted(tensor)
        with gathered([tensor]):
            if is_first():
                found |= dict.fromkeys(its_names, tensor.detach().to("cpu", copy=parted))
    return {name: found[name] for name in tensors if name in found}


def is_parted(parameter: Any) -> bool:
    """Whether this process holds a part of the parameter alone."""
    status = getattr(parameter, "ds_status", None)
    return status is not None and status.name == "NOT_AVAILABLE"


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The shape of a parameter in full."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
