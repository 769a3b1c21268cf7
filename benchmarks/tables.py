"""The table that `bench.py` and `gpu.py` write: a row for every kind of work, model and dtype, ours beside TRL."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measurement import SAMPLING, STANDARD, WORK, Load, Measurement, median

GOALS = {"rloo": (3.0, 0.7), "grpo": (2.5, 0.7), "online_dpo": (2.0, 0.7), "dpo": (2.5, 0.7), "dpo_later": (3.0, 0.7),
         "reward": (1.3, 0.8), "sft": (1.3, 0.8)}  # fmt: skip
"""How many times as fast as TRL, and what share of its peak memory at most."""
LEFT_OUT = "left out: the time was up"
NAMES = {"ours": "ours", "peer": "TRL"}


@dataclass(frozen=True)
class Cell:
    """One process, and what it measured."""

    system: str
    what: str
    size: str
    dtype: str
    measurement: Measurement | None
    problem: str = ""
    """Why there is no measurement."""


@dataclass
class Run:
    """Everything measured in one run, and what it was measured on."""

    steps: int
    threads: int
    versions: dict[str, str]
    data: Path | None
    about: dict[str, Any] = field(default_factory=dict)
    """What workload.py says of the data."""
    cells: list[Cell] = field(default_factory=list)
    load: Load = STANDARD
    gpu: str = ""
    """What they were measured on; empty for this machine's processors."""


def progress(cell: Cell) -> str:
    """One line on a measurement that has just been made."""
    label = f"{NAMES[cell.system]:<5}{cell.what:<11}{cell.size:<4}{cell.dtype}"
    if (found := cell.measurement) is None:
        return f"{label}  {_missing(cell)}{'' if cell.problem == LEFT_OUT else f': {cell.problem}'}"
    length = "" if found.response_tokens is None else f", {found.response_tokens:.1f} tokens a response"
    spread = f"{median(found.seconds):.3f} s a step ({min(found.seconds):.3f} to {max(found.seconds):.3f})"
    memory = f"peak {found.peak_mb:.0f} MB, {_beside(found)}"
    return f"{label}  {spread}, {memory}, {found.threads} threads{length}"


def report(run: Run) -> str:
    """Machine, versions and data in a paragraph, then the table."""
    shown = ", ".join(f"{name} {number}" for name, number in run.versions.items())
    data = f"Pairs of {run.about['data']}" if run.about.get("data") else "Made-up pairs"
    left_out = f" ({run.about['left_out']} longer ones left out)" if run.about.get("left_out") else ""
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, {run.gpu or machine()}, {run.threads} threads. {shown}. {data}{left_out}. "
        f"{lengths(run.cells)}Median of {run.steps} steps.",
        "",
        "| work | model | dtype | ours: s a step (tokens/s) | TRL | times as fast (goal) "
        f"| ours: peak MB ({'reserved' if run.gpu else 'above start'}) | TRL | share (goal) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = dict.fromkeys((cell.what, cell.size, cell.dtype) for cell in run.cells)
    return "\n".join([*lines, *(_row(run, *row) for row in rows)])


def written(text: str, table: str, name: str = "bench") -> str:
    """The file's text with the table between the markers of this name, which are added at its end if there are none."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    block = f"{start}\n{table}\n{end}"
    if start not in text:
        return f"{text.rstrip()}\n\n{block}\n"
    before, _, rest = text.partition(start)
    return before + block + rest.partition(end)[2]


def lengths(cells: Sequence[Cell]) -> str:
    """The mean length of the sampled responses on either side, as a sentence."""
    found = {
        name: [
            cell.measurement.response_tokens
            for cell in cells
            if cell.system == system and cell.measurement and cell.measurement.response_tokens is not None
        ]
        for system, name in NAMES.items()
    }
    shown = " and ".join(f"{sum(values) / len(values):.1f} ({name})" for name, values in found.items() if values)
    return f"Sampled responses have {shown} tokens on average. " if shown else ""


def machine() -> str:
    """Processor, cores and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GB"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def _row(run: Run, what: str, size: str, dtype: str) -> str:
    row = {cell.system: cell for cell in run.cells if (cell.what, cell.size, cell.dtype) == (what, size, dtype)}
    ours, peer = (row[system].measurement if system in row else None for system in NAMES)
    faster = smaller = "-"
    if ours and peer:
        faster = f"{median(peer.seconds) / median(ours.seconds):.2f} ({GOALS[what][0]:g})"
        smaller = f"{ours.peak_mb / peer.peak_mb:.2f} ({GOALS[what][1]:g})"
    times = [_time(run, row[system]) if system in row else "-" for system in NAMES]
    memory = [_memory(row[system]) if system in row else "-" for system in NAMES]
    return f"| {' | '.join([WORK[what], size, dtype, *times, faster, *memory, smaller])} |"


def _time(run: Run, cell: Cell) -> str:
    if (found := cell.measurement) is None:
        return _missing(cell)
    seconds = median(found.seconds)
    return f"{seconds:.3f} ({tokens(run, cell.what, found) / seconds:.0f})"


def _memory(cell: Cell) -> str:
    if (found := cell.measurement) is None:
        return _missing(cell)
    beside = found.growth_mb if found.reserved_mb is None else found.reserved_mb
    return f"{found.peak_mb:.0f} ({beside:.0f})"


def _missing(cell: Cell) -> str:
    """Why there is no measurement, in two words."""
    return "left out" if cell.problem == LEFT_OUT else "failed"


def _beside(found: Measurement) -> str:
    """What is worth knowing beside the peak."""
    if found.reserved_mb is not None:
        return f"{found.reserved_mb:.0f} reserved"
    return f"{found.growth_mb:.0f} above the start"


def tokens(run: Run, what: str, found: Measurement) -> float:
    """Tokens of a step: sampled ones, or those of the rows it learns from, padding left out."""
    if what in SAMPLING:
        return run.load.responses * (found.response_tokens or run.load.response_tokens)
    return float(run.about["sft_tokens" if what == "sft" else "pair_tokens"]) / (run.steps + 1)
