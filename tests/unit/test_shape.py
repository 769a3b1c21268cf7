"""Short files and functions, nouns for names, no code loaded from data, every setting explained."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.settings import Group, StepSettings

ROOT = Path(__file__).parents[2]
SOURCE = ("pipeline", "components")
ALL_FOLDERS = (*SOURCE, "containers", "tests", "benchmarks", ".ci")
MAX_FILE_LINES = 250
MAX_FUNCTION_LINES = 40
LONGER_FILES: set[str] = set()  # a path here needs a reason beside it
NO_NOUNS = {"utils", "util", "common", "core", "helpers", "helper", "misc"}
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
PICKLING_CALLS = {"torch.save", "torch.load", "to_pickle", "read_pickle"}


def files(*folders: str, pattern: str = "*") -> list[Path]:
    """The files under these folders, without what tools leave there."""
    found = (path for folder in folders for path in (ROOT / folder).rglob(pattern) if path.is_file())
    return sorted(path for path in found if "__pycache__" not in path.parts and path.name != ".DS_Store")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def function_lengths(source: str) -> dict[str, int]:
    """The lines of every function, from `def` to its end, by name and line."""
    return {
        f"{node.name}:{node.lineno}": (node.end_lineno or node.lineno) - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def unsafe_lines(source: str) -> list[str]:
    """The lines that run code from a downloaded file: pickles, and model code fetched from elsewhere."""
    return [
        f"{getattr(node, 'lineno', 0)}: {reason}"
        for node in ast.walk(ast.parse(source))
        for reason in unsafe(node)
    ]


def unsafe(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import():
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES)
        case ast.ImportFrom(module=str(module)):
            if module.split(".")[0] in PICKLES:
                yield module
            yield from (f"{module}.{a.name}" for a in node.names if f"{module}.{a.name}" in PICKLING_CALLS)
        case ast.Attribute():
            if ast.unparse(node) in PICKLING_CALLS or node.attr in PICKLING_CALLS:
                yield ast.unparse(node)
        case ast.keyword(arg="trust_remote_code", value=value) if ast.unparse(value) != "False":
            yield "trust_remote_code"
        case ast.Dict():
            for key, value in zip(node.keys, node.values, strict=True):
                if key and ast.unparse(key) == "'trust_remote_code'" and ast.unparse(value) != "False":
                    yield "trust_remote_code"


def settings_modules() -> list[str]:
    paths = [path for path in files(*SOURCE, pattern="*.py") if path.stem == "settings"]
    return [name(path).removesuffix(".py").replace("/", ".") for path in paths]


def groups(module: str) -> list[type[Group]]:
    """The settings classes that a module defines."""
    members = vars(importlib.import_module(module)).values()
    return [m for m in members if inspect.isclass(m) and issubclass(m, Group) and m.__module__ == module]


def test_source_files_are_short() -> None:
    paths = files(*SOURCE, pattern="*.py")
    lines = {name(path): len(path.read_text("utf-8").splitlines()) for path in paths}
    assert len(lines) >= 30
    assert not {path: n for path, n in lines.items() if n >= MAX_FILE_LINES and path not in LONGER_FILES}
    assert all(lines[path] >= MAX_FILE_LINES for path in LONGER_FILES), "an exception that is none any more"


def test_nine_functions_in_ten_are_short() -> None:
    lengths = {
        f"{name(path)}:{function}": n
        for path in files(*SOURCE, pattern="*.py")
        for function, n in function_lengths(path.read_text("utf-8")).items()
    }
    assert len(lengths) >= 100
    longer = sorted((n, function) for function, n in lengths.items() if n >= MAX_FUNCTION_LINES)
    assert len(longer) <= len(lengths) / 10, longer


def test_a_function_is_measured_from_def_to_its_last_line() -> None:
    source = "@decorator\ndef outer():\n    def inner():\n        return 1\n\n    return inner\n"
    assert function_lengths(source) == {"outer:2": 5, "inner:3": 2}


def test_every_folder_and_module_has_a_noun_for_a_name() -> None:
    names = {part for path in files(*ALL_FOLDERS) for part in Path(name(path)).with_suffix("").parts}
    assert not names & NO_NOUNS


def test_no_file_is_empty() -> None:
    empty = [name(p) for p in files(*ALL_FOLDERS) if p.name != "__init__.py" and not p.read_bytes().strip()]
    assert not empty


def test_tests_hold_no_package() -> None:
    assert not files("tests", pattern="__init__.py"), "a package under tests shadows the real one"


def test_nothing_loads_pickles_or_remote_code() -> None:
    found = {name(path): unsafe_lines(path.read_text("utf-8")) for path in files(*SOURCE, pattern="*.py")}
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from cloudpickle import dumps",
        "torch.save(model, path)",
        "weights = torch.load(path, weights_only=True)",
        "from torch import load",
        "frame.to_pickle(path)",
        "load(name, trust_remote_code=True)",
        "load(name, trust_remote_code=settings.trust)",
        "options = {'trust_remote_code': True}",
    ],
)
def test_an_unsafe_line_is_seen(source: str) -> None:
    assert len(unsafe_lines(source)) == 1


def test_a_safe_line_passes() -> None:
    assert not unsafe_lines("load(name, trust_remote_code=False)\nsave_file(tensors, path)\njson.load(file)")


def test_every_setting_is_explained() -> None:
    found = [group for module in settings_modules() for group in groups(module)]
    silent = [
        f"{group.__module__}.{group.__name__}.{field}"
        for group in found
        for field, info in group.model_fields.items()
        if not (info.description or "").strip()
    ]
    assert len(found) >= 15
    assert not silent


def test_every_group_of_settings_says_what_it_is_for() -> None:
    assert not [g.__name__ for module in settings_modules() for g in groups(module) if not g.__doc__]


def test_each_step_has_one_settings_class_named_after_it() -> None:
    modules = [module for module in settings_modules() if module.count(".") == 2]
    assert len(modules) >= 5
    for module in modules:
        step = module.split(".")[1]
        own = [group.__name__ for group in groups(module) if issubclass(group, StepSettings)]
        assert [found.lower() for found in own] == [f"{step}settings"], module


def test_a_setting_without_a_docstring_is_seen() -> None:
    class Silent(Group):
        """Holds a field that nobody explained."""

        explained: int = 1
        """What it is."""
        silent: int = 2

    assert [field for field, info in Silent.model_fields.items() if not info.description] == ["silent"]
