"""The mutation tester: the mistakes it makes, what it leaves alone, and that they reach whoever uses the code."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The two modules, as `make mutation` imports them."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield SimpleNamespace(mutants=importlib.import_module("mutants"), mutation=importlib.import_module("mutation"))
    for name in ("mutants", "mutation"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a + b", {"a - b"}),
        ("a - b", {"a + b", "b - a"}),
        ("a / b", {"a * b", "b / a", "-(a / b)"}),
        ("-a", {"a"}),
        ("~a", {"a"}),
        ("a < b", {"a <= b", "a > b"}),
        ("a == b", {"a != b"}),
        ("a and b", {"a or b"}),
        ("a if b else c", {"c if b else a"}),
        ("True", {"False"}),
        ("3", {"4", "2"}),
        ("0.5", {"1.5", "-0.5"}),
        ("'k1'", {"'k1~'"}),
        ("f(a, b)", {"f(b, a)"}),
        ("max(a, b)", {"min(a, b)"}),
        ("a.argmax()", {"a.argmin()"}),
        ("a.detach()", {"a"}),
        ("f(a, weights=w)", {"f(a)"}),
    ],
)
def test_a_line_has_these_mutants(tools: Any, line: str, expected: set[str]) -> None:
    found = {mutant.change for mutant in tools.mutants.mutants(f"x = {line}", "x.py")}
    assert found == {f"{line} -> {changed}" for changed in expected}


def test_statements_and_conditions_are_mutated_and_named_by_function_and_line(tools: Any) -> None:
    source = "def f(self, a):\n    if a:\n        self.n += 1\n    self.go()\n"
    found = [(m.line, m.function, m.change) for m in tools.mutants.mutants(source, "x.py")]
    assert found == [
        (2, "f", "a -> not a"), (3, "f", "self.n += 1 -> self.n -= 1"), (3, "f", "self.n += 1 -> pass"),
        (3, "f", "1 -> 2"), (3, "f", "1 -> 0"), (4, "f", "self.go() -> pass"),
    ]  # fmt: skip


def test_what_is_no_behaviour_has_no_mutants(tools: Any) -> None:
    source = (
        '"""Text."""\nfrom typing import Literal\nName = Literal["a", "b"]\n'
        'class C:\n    """Text."""\n    n: int | None\n    """Text."""\n'
        "@cache(1)\ndef f(a: Literal[1] | None) -> int | None:\n    assert a == 1\n    raise ValueError(f'{a + 1}')\n"
    )
    assert [mutant.change for mutant in tools.mutants.mutants(source, "x.py")] == []


PLANTED = """
import functools
LIMIT = 2.0

def plain(a, b=1.0):
    return a + b

def traced(function):
    @functools.wraps(function)
    def wrapper(*given):
        return function(*given)
    return wrapper

@traced
def decorated(a):
    return a * 2.0

class Base:
    def __init__(self):
        self.base = 3.0

class Kind(Base):
    size = 4.0

    def __init__(self):
        super().__init__()
        self.own = 5.0

    @property
    def half(self):
        return self.own / 2.0

    @classmethod
    def made(cls):
        return cls().own + 1.0
"""


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        ("a + b -> a - b", 3.0, 1.0),
        ("1.0 -> 2.0", 3.0, 4.0),
        ("a * 2.0 -> a / 2.0", 8.0, 2.0),
        ("2.0 -> 3.0", 2.0, 3.0),
        ("super().__init__() -> pass", True, False),
        ("4.0 -> 5.0", 4.0, 5.0),
        ("self.own / 2.0 -> self.own * 2.0", 2.5, 10.0),
        ("cls().own + 1.0 -> cls().own - 1.0", 6.0, 4.0),
    ],
)
def test_a_mutant_reaches_whoever_imported_the_function_before(
    tools: Any, change: str, before: object, after: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, user = ModuleType("components.planted"), ModuleType("components.user")
    module.__file__ = "planted.py"
    for made in (module, user):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    exec(compile(PLANTED, "planted.py", "exec"), vars(module))
    exec("from components.planted import LIMIT, Kind, decorated, plain", vars(user))
    kind, look = vars(user)["Kind"], vars(user)
    seen = {
        "a + b -> a - b": lambda: look["plain"](2.0),
        "1.0 -> 2.0": lambda: look["plain"](2.0),
        "a * 2.0 -> a / 2.0": lambda: look["decorated"](4.0),
        "2.0 -> 3.0": lambda: look["LIMIT"],
        "super().__init__() -> pass": lambda: hasattr(kind(), "base"),
        "4.0 -> 5.0": lambda: kind.size,
        "self.own / 2.0 -> self.own * 2.0": lambda: kind().half,
        "cls().own + 1.0 -> cls().own - 1.0": lambda: kind.made(),
    }[change]
    assert seen() == before
    mutant = next(m for m in tools.mutants.mutants(PLANTED, "planted.py") if m.change == change)
    tools.mutation.plant(module, tools.mutation.executed(module, mutant), "planted.py")
    assert seen() == after


def test_equivalent_mutants_are_taken_off_as_often_as_they_are_listed(tools: Any, monkeypatch: Any) -> None:
    def mutant(function: str, change: str) -> Any:
        return tools.mutants.Mutant(1, function, change, compile("", "x.py", "exec"))

    first, second, other = mutant("f", "0 -> 1"), mutant("f", "0 -> 1"), mutant("g", "0 -> 1")
    monkeypatch.setattr(tools.mutation, "EQUIVALENT", {("x.py", "f", "0 -> 1"): (1, "because")})
    assert len(tools.mutation.without_equivalent("x.py", [first, second, other])) == 2
    assert tools.mutation.without_equivalent("y.py", [first, other]) == [first, other]
    with pytest.raises(SystemExit, match="take it off the list"):
        tools.mutation.without_equivalent("x.py", [other])


def test_every_file_that_is_mutated_and_every_test_of_it_is_there(tools: Any) -> None:
    named = {*tools.mutation.TESTS, *(path for paths in tools.mutation.TESTS.values() for path in paths)}
    assert len(tools.mutation.TESTS) == 11 and not [path for path in named if not (ROOT / path).exists()]
    assert {file for file, _, _ in tools.mutation.EQUIVALENT} <= set(tools.mutation.TESTS)
