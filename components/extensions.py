"""A person's own functions, named in the settings: `module:function`, or what an installed package registers."""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from components.errors import InputError


def named_function(name: str, key: str, group: str | None = None) -> Callable[..., Any]:
    """The function `module:function` or, without a colon, the entry point of that name in `group`.

    Raises InputError naming `key` when there is no such function, or more than one.
    """
    if ":" not in name and group is not None:
        name = _registered(name, key, group).value.partition("[")[0].strip()
    module, _, function = name.partition(":")
    if not module or not function:
        raise InputError(f"{key} is {name!r}; accepted: module:function, as in my_package.judge:judge_all.")
    try:
        found = getattr(import_module(module), function, None)
    except ImportError as error:
        raise InputError(
            f"{key} is {name!r}, and its module cannot be imported: {error}. "
            "Install it, or put its folder on PYTHONPATH."
        ) from None
    if not callable(found):
        raise InputError(f"{key} is {name!r}, but {module} has no function {function!r}.")
    return found  # type: ignore[no-any-return]


def _registered(name: str, key: str, group: str) -> EntryPoint:
    """The one entry point of that name. Raises InputError listing those installed."""
    installed = entry_points(group=group)
    found = [point for point in installed if point.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        packages = ", ".join(sorted(point.dist.name if point.dist else "?" for point in found))
        raise InputError(
            f"{key} is {name!r}, which several packages register ({packages}). Name the function itself: "
            f"{' or '.join(sorted(point.value for point in found))}."
        )
    names = ", ".join(sorted(installed.names)) or "none is installed"
    raise InputError(
        f"{key} is {name!r}; accepted: module:function, or the name of an entry point in {group} ({names}). Install "
        "the package that registers it, or name the function itself."
    )
