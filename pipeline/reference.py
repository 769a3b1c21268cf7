"""The reference of all settings, from the classes: `python -m pipeline.reference` writes it into README.md beside this.

A section for the pipeline, one for every step, and one for every group and union member that they hold, in the order
in which they first appear; a table row per key.
"""

import types
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from components.parsing import flattened, members
from pipeline.settings import Settings

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- settings -->", "<!-- /settings -->"
SIGNS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<", MinLen: "length ≥", MaxLen: "length ≤"}
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path", type(None): "none"}


def reference() -> str:
    """Markdown: a heading and a table for every class of settings."""
    return "\n\n".join(section(model) for model in classes(Settings))


def classes(root: type[BaseModel]) -> list[type[BaseModel]]:
    """The class and all that its fields hold, each once: a class, then those of its fields, then those of theirs."""
    found = [root]
    for model in found:  # grows meanwhile
        held = [member for field in model.model_fields.values() for member in members(field.annotation)]
        found += [member for member in dict.fromkeys(held) if member not in found]
    return found


def section(model: type[BaseModel]) -> str:
    """The heading, the docstring and the table of a class."""
    first = (model.__doc__ or "").strip().partition("\n")[0]
    rows = [f"| `{name}` | {' | '.join(cells(field))} |" for name, field in model.model_fields.items()]
    head = [f"### {model.__name__}", "", first, "", "| key | accepted | default | |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])


def cells(field: FieldInfo) -> tuple[str, str, str]:
    """What a key accepts, its default, and what it is for."""
    kinds = list(dict.fromkeys(accepted(field.annotation)))
    values = ", ".join(kind for kind in kinds if kind != WORDS[type(None)])
    bounds = ", ".join(bound(item) for item in field.metadata if type(item) in SIGNS)
    absent = f", or {WORDS[type(None)]}" if WORDS[type(None)] in kinds else ""
    what = " ".join((field.description or "").split())
    return cell(f"{values} {bounds}".strip() + absent), cell(default(field)), cell(what)


def accepted(annotation: Any) -> Iterator[str]:
    """The kinds of value that an annotation allows; a class of settings is a link to its section."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from accepted(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for argument in get_args(annotation):
            yield from accepted(argument)
    elif origin is Literal:
        yield from (f"`{value}`" for value in get_args(annotation))
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    elif origin in (list, tuple):
        arguments = [argument for argument in get_args(annotation) if argument is not ...]
        yield f"list of {' or '.join(dict.fromkeys(kind for argument in arguments for kind in accepted(argument)))}"
    elif origin is dict:
        yield f"keys of your own: {', '.join(accepted(get_args(annotation)[1]))}"
    else:
        yield WORDS[annotation]


def bound(item: Any) -> str:
    """A bound of a number or of a length, as people write it."""
    (value,) = astuple(item)
    return f"{SIGNS[type(item)]} {'2^31' if value == 2**31 else value}"


def default(field: FieldInfo) -> str:
    """A default as YAML would say it; of settings, those values that are not their class's own."""
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if not isinstance(value, BaseModel):
        return "none" if value is None else f"`{shown(value)}`"
    own = dict(flattened(type(value)().model_dump(mode="json"))) if not required(type(value)) else {}
    changed = {key: v for key, v in flattened(value.model_dump(mode="json")) if own.get(key, v) != v}
    kind = type(value).__name__ if len(members(field.annotation)) > 1 else ""
    return ", ".join([*([kind] if kind else []), *(f"`{key}: {shown(v)}`" for key, v in changed.items())])


def required(model: type[BaseModel]) -> bool:
    """Whether a class cannot be made from nothing."""
    return any(field.is_required() for field in model.model_fields.values())


def shown(value: Any) -> str:
    """A plain value as it stands in YAML."""
    from pipeline.documents import write_document

    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_none=True)
    elif isinstance(value, (list, tuple)):
        return f"[{', '.join(shown(item) for item in value)}]"
    elif value == "":
        return '""'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    return write_document({"value": value}).removeprefix("value:").strip()


def cell(text: str) -> str:
    """Text that a table's cell can hold."""
    return text.replace("|", "\\|")


def written(document: str) -> str:
    """The document with the reference between its markers."""
    before, _, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{README.name} has no {BEGIN} ... {END}"
    return f"{before}{BEGIN}\n{reference()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(written(README.read_text("utf-8")), "utf-8")
    print(f"wrote {README.name}")
