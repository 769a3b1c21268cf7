"""TRAPS.md against the tests: every trap has a line, and every test that a line names exists."""

import ast
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
NUMBERS = [*(f"D{number}" for number in range(1, 13)), *(f"T{number}" for number in range(1, 56))]


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    number: str
    trap: str
    answer: str
    tests: list[str]


def lines(text: str) -> list[Line]:
    """The lines of the table, without its head."""
    rows = [row.strip().strip("|").split(" | ") for row in text.splitlines() if row.startswith("| ")]
    found = [[cell.strip() for cell in row] for row in rows]
    return [Line(row[0], row[1], row[2], re.findall(r"`([^`]+)`", row[3])) for row in found[1:]]


@cache
def names_in(path: str) -> frozenset[str]:
    """The test functions and classes of a file below tests/; none when there is no such file."""
    file = TESTS / path
    if not file.is_file():
        return frozenset()
    return frozenset(
        node.name
        for node in ast.parse(file.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and node.name.lower().startswith("test")
    )


def missing(tests: list[str]) -> list[str]:
    """Those of the tests (`path::name`) that do not exist."""
    return [test for test in tests if test.partition("::")[2] not in names_in(test.partition("::")[0])]


@pytest.fixture(scope="module")
def table() -> list[Line]:
    return lines((TESTS / "TRAPS.md").read_text("utf-8"))


def test_every_number_is_there_once_and_in_order(table: list[Line]) -> None:
    assert [line.number for line in table] == NUMBERS


def test_every_test_that_is_named_exists_where_it_is_said_to_be(table: list[Line]) -> None:
    named = [test for line in table for test in line.tests]
    assert len(named) >= len(NUMBERS)
    assert not missing(named)


def test_every_line_says_what_the_trap_is_what_we_do_and_names_each_of_its_tests_once(table: list[Line]) -> None:
    for line in table:
        assert len(line.trap) > 15 and len(line.answer) > 10 and line.tests, line.number
        assert not [test for test, times in Counter(line.tests).items() if times > 1], line.number


def test_a_test_is_named_under_one_path_alone(table: list[Line]) -> None:
    paths: dict[str, set[str]] = {}
    for path, _, name in (test.partition("::") for line in table for test in line.tests):
        paths.setdefault(name, set()).add(path)
    assert not {name: where for name, where in paths.items() if len(where) > 1}


def test_every_test_of_a_trap_is_named_in_the_table(table: list[Line]) -> None:
    named = {test for line in table for test in line.tests}
    files = [path for path in sorted((TESTS / "unit").glob("test_traps_*.py")) if path != Path(__file__)]
    written = {f"unit/{path.name}::{name}" for path in files for name in names_in(f"unit/{path.name}")}
    assert len(files) >= 5 and len(written) >= 50
    assert not written - named


def test_what_does_not_exist_is_seen() -> None:
    here = "unit/test_traps_index.py::test_what_does_not_exist_is_seen"
    gone = ["unit/test_traps_index.py::test_gone", "unit/test_gone.py::test_what_does_not_exist_is_seen", "test_gone"]
    assert missing([here, *gone]) == gone
    assert not missing([here])
    (line,) = lines("| | The trap | Ours | Tests |\n|---|---|---|---|\n| T1 | a | b | `x::y`<br>`z::w` |\n")
    assert line == Line("T1", "a", "b", ["x::y", "z::w"])
