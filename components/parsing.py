"""From plain values (YAML, JSON, Kubeflow's dicts) to settings, with errors that a person can act on.

Values left out take the default of the place they are left out of: `sft.training.epochs: 1` changes the
epochs and keeps what else `SFTSettings` says about training, where pydantic alone would fall back to
`Training`'s own defaults. Members of a union are told apart by their tag: `rl.algorithm` by `name`, a scorer by `kind`.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from components.errors import InputError

MAX_ERRORS = 5
Key = tuple[str, ...]
Model = TypeVar("Model", bound=BaseModel)


def parse(
    model: type[Model],
    values: Mapping[str, Any],
    prefix: Key = (),
    origin: Callable[[Key], str] = lambda key: "",
) -> Model:
    """The settings that `values` describe.

    `prefix` stands before every key in messages; `origin` says where a key was set. Raises InputError naming
    the key, the value seen and what is accepted.
    """
    try:
        return model.model_validate(_completed(model, values, None))
    except ValidationError as error:
        problems: dict[Key, list[str]] = {}
        for details in error.errors(include_url=False):
            key, message = _explained(model, details, prefix)
            problems.setdefault(key, []).append(message)
        lines = [_line(prefix + key, messages, origin(key)) for key, messages in problems.items()]
        raise InputError("\n".join(lines[:MAX_ERRORS])) from None


def members(annotation: Any) -> list[type[BaseModel]]:
    """Every settings class that the annotation of a field can hold, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in members(argument)]


def tag_field(models: Sequence[type[BaseModel]]) -> str:
    """The field that tells the members of a union apart, which each fixes to a literal; empty if there is none."""
    shared = [name for name in models[0].model_fields if all(_fixed(model, name) for model in models)] if models else []
    return shared[0] if shared else ""


def tagged(models: Sequence[type[BaseModel]], tag: Any) -> type[BaseModel] | None:
    """The member of a union whose tag is the literal `tag`, or None."""
    name = tag_field(models)
    return next((model for model in models if name and tag in _fixed(model, name)), None)


def _fixed(model: type[BaseModel], name: str) -> tuple[Any, ...]:
    """The one literal that a field can hold; nothing for a field with a choice, or none of that name."""
    annotation = model.model_fields[name].annotation if name in model.model_fields else None
    values = get_args(annotation) if get_origin(annotation) is Literal else ()
    return values if len(values) == 1 else ()


def flattened(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested settings under its dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{above}{key}.")
        else:
            yield above + key, value


def _is_dict(annotation: Any) -> bool:
    """Whether a field holds settings under names that a person chooses: null takes one out, defaults add none."""
    return get_origin(annotation) in (dict, Mapping)


def _completed(model: type[BaseModel], values: Mapping[str, Any], default: BaseModel | None) -> dict[str, Any]:
    """The values, with what they leave out taken from `default` and, below, from the fields' own defaults."""
    result = dict(values)
    for name, field in model.model_fields.items():
        fallback = getattr(default, name) if default is not None else field.get_default(call_default_factory=True)
        if name not in result:
            if default is not None:
                result[name] = fallback
        elif not isinstance(given := result[name], Mapping):
            continue
        elif _is_dict(field.annotation):
            result[name] = {key: value for key, value in given.items() if value is not None}
        else:
            member = _member(members(field.annotation), given, fallback)
            if member is not None:
                result[name] = _completed(member, given, fallback if type(fallback) is member else None)
    return result


def _member(models: list[type[BaseModel]], given: Mapping[str, Any], fallback: Any) -> type[BaseModel] | None:
    """Which of a field's classes the given values are meant for: the one they name, else the default's."""
    if len(models) == 1:
        return models[0]
    if (tag := tag_field(models)) in given:
        return tagged(models, given[tag])
    return type(fallback) if type(fallback) in models else None


def _explained(model: type[BaseModel], details: ErrorDetails, prefix: Key) -> tuple[Key, str]:
    """The key an error is about, and what is wrong with its value; keys in the text have the prefix."""
    key, models = _located(model, details["loc"])
    kind, value = details["type"], details["input"]
    if kind == "extra_forbidden":
        return key, _unknown(model, key, models, prefix)
    if kind == "missing":
        return key, f"is missing; {_accepted(details)}"
    if kind == "union_tag_invalid":
        context = details["ctx"]
        return (*key, tag_field(models)), f"is {context['tag']!r}; accepted: {context['expected_tags']}."
    if kind == "union_tag_not_found":
        return (*key, tag_field(models)), f"is missing; say which one is meant: {_names(models)}."
    if kind == "value_error":
        return key, str(details["ctx"]["error"])
    if kind in ("model_type", "model_attributes_type"):
        return key, f"is {value!r}; accepted: keys below it, such as {'.'.join((*prefix, *key))}.{_first_key(models)}."
    return key, f"is {value!r}; {_accepted(details)}"


def _located(model: type[BaseModel], location: Sequence[int | str]) -> tuple[Key, list[type[BaseModel]]]:
    """The key at pydantic's location, without the tags it inserts, and the classes it is looked up in."""
    key: list[str] = []
    models = [model]
    named = False  # whether the next item is a name that a person chose, in a dict of settings
    for depth, item in enumerate(location):
        holder = next((m for m in models if item in m.model_fields), None)
        if named:
            key.append(str(item))
            named = False
        elif len(models) > 1 and (chosen := tagged(models, item)):  # before fields, whose name a tag may have
            models = [chosen]
        elif holder is not None:
            key.append(str(item))
            annotation = holder.model_fields[str(item)].annotation
            models, named = members(annotation), _is_dict(annotation)
        elif isinstance(item, int) or (depth == len(location) - 1 and models and not _is_tag(models, item)):
            key.append(str(item))
        else:
            models = [m for m in models if m.__name__ == item] or models
    return tuple(key), models


def _is_tag(models: list[type[BaseModel]], item: int | str) -> bool:
    return tagged(models, item) is not None or any(m.__name__ == item for m in models)


def _unknown(root: type[BaseModel], key: Key, models: list[type[BaseModel]], prefix: Key) -> str:
    """What to say of a key nobody knows: the nearest one here, or where its namesake is, or all there are."""
    name = key[-1]
    known = sorted({field for model in models for field in model.model_fields})
    near = difflib.get_close_matches(name, known, n=1)
    elsewhere = next((path for path in _paths(root) if path[-1] == name), None)
    if elsewhere == key:
        hint = f"it belongs to another choice of {_tag_beside(root, key)} beside it."
    elif near:
        hint = f"did you mean {'.'.join((*prefix, *key[:-1], near[0]))}?"
    elif elsewhere is not None:
        hint = f"did you mean {'.'.join((*prefix, *elsewhere))}?"
    else:
        hint = "it is not a setting."
    return f"is unknown; {hint} Accepted here: {', '.join(known)}."


def _tag_beside(root: type[BaseModel], key: Key) -> str:
    """The tag of the union in which `key` is looked up."""
    models = [root]
    for part in key[:-1]:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        models = [member for field in fields for member in members(field.annotation)]
    return tag_field(models)


def _paths(model: type[BaseModel], above: Key = ()) -> Iterator[Key]:
    """Every key of the tree below `model`."""
    for name, field in model.model_fields.items():
        yield (*above, name)
        for member in members(field.annotation):
            yield from _paths(member, (*above, name))


def _accepted(details: ErrorDetails) -> str:
    """Pydantic's words for what it accepts, as the second half of our sentence."""
    message = details["msg"]
    for opening in ("Input should be ", "Field "):
        message = message.removeprefix(opening)
    message = message.replace("String should match pattern", "text that matches")
    return f"accepted: {message.partition(', unable')[0]}."


def _names(models: list[type[BaseModel]]) -> str:
    return ", ".join(str(value) for model in models for value in _fixed(model, tag_field(models)))


def _first_key(models: list[type[BaseModel]]) -> str:
    return tag_field(models) if len(models) > 1 else next(iter(models[0].model_fields), "") if models else ""


def _line(key: Key, messages: list[str], origin: str) -> str:
    message = " ".join(dict.fromkeys(messages))
    where = f" (set {origin})" if origin else ""
    return f"{'.'.join(key)} {message}{where}".strip()
