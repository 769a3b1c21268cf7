"""What `plumbline conformance` prints: a line per golden vector, and how many passed."""

import inspect
import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from components.conformance import ours
from components.conformance.check import TOLERANCES, Outcome, check_vectors, load_library
from components.conformance.vectors import read_vectors

STYLES = {"pass": "green", "FAIL": "bold red", "differs": "yellow", "not offered": "dim"}


def conform(against: str, dtype: Literal["float64", "float32"], console: Console | None = None) -> bool:
    """Check a library and print the table; whether everything it offers passed.

    Raises InputError for a library that cannot be imported or offers nothing.
    """
    console = console or Console()
    precision = {"float64": torch.float64, "float32": torch.float32}[dtype]
    outcomes = check_vectors(load_library(against), read_vectors(), precision)
    console.print(outcome_table(outcomes, f"{against}, {dtype}", TOLERANCES[precision]))
    counts = Counter(outcome.status for outcome in outcomes)
    told = f"{counts['pass']} pass, {counts['FAIL']} fail, {counts['differs']} differ on purpose"
    console.print(f"{len(outcomes)} vectors: {told}, {counts['not offered']} not offered", highlight=False)
    return not counts["FAIL"]


def outcome_table(outcomes: Sequence[Outcome], title: str, tolerance: float) -> Table:
    """A line per vector, one for all vectors of a function that is missing."""
    table = Table(title=f"golden vectors: {title}")
    for header in ("function", "vector", "max error", "tolerance", "result"):
        table.add_column(header, overflow="fold")
    absent = Counter(outcome.vector.function for outcome in outcomes if outcome.absent)
    for outcome in outcomes:
        function, _, variant = outcome.vector.name.partition("/")
        if outcome.absent:
            variant = f"all {absent.pop(function)}" if function in absent else ""
        if variant:
            numbers = ["", ""] if math.isnan(outcome.error) else [f"{outcome.error:.1e}", f"{tolerance:.0e}"]
            text = outcome.status + (f": {outcome.reason}" if outcome.reason else "")
            table.add_row(function, variant, *numbers, Text(text, STYLES[outcome.status]))
    return table


def print_functions(console: Console | None = None) -> None:
    """The functions that a module may offer, with their arguments."""
    console = console or Console(soft_wrap=True)
    for name in dict.fromkeys(vector.function for vector in read_vectors()):
        function = getattr(ours, name)
        arguments = ", ".join(
            f"{parameter.name}: {_written(parameter.annotation)}"
            for parameter in inspect.signature(function).parameters.values()
        )
        returned = _written(inspect.signature(function).return_annotation)
        console.print(f"{name}(*, {arguments}) -> {returned}", markup=False, highlight=False, style="bold")
        console.print(f"    {inspect.getdoc(function)}", markup=False, highlight=False)


def _written(annotation: object) -> str:
    """A type as a person writes it."""
    text = annotation.__name__ if isinstance(annotation, type) and "[" not in str(annotation) else str(annotation)
    return text.replace("torch.Tensor", "Tensor").replace("typing.", "")
