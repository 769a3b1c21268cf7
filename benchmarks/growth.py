"""What a step of our engine costs as it grows: rloo over longer responses and over more of them.

    python benchmarks/growth.py [--quick] [--size 7m] [--dtype fp32] [--steps 3] [--threads 2]

A step samples responses to prompts of 64 tokens, four to a prompt, scores them and takes one update. Either the
responses get longer, 32 of 64 to 512 tokens, or they get more, 16 to 256 of 64 tokens. Every measurement is a process
of its own; the first step is left out. The whole run writes its table into README.md beside this file, and growth.svg;
a part of it (--quick, or any other model) is printed alone. Exits 1 when a measurement fails, 130 after Ctrl-C.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import DTYPES, SIZES, measured, versions
from children import HERE, Children, nursery
from measurement import Load, Measurement, Task, median
from options import positive
from tables import machine, written

LENGTHS, BATCHES = (64, 128, 256, 512), (16, 32, 64, 128, 256)
QUICK_LENGTHS, QUICK_BATCHES = (64, 128), (16, 32)
LENGTH, BATCH = 64, 32
"""Where only the other grows."""
PICTURE = HERE / "growth.svg"


@dataclass(frozen=True)
class Point:
    """One process, and what it measured."""

    batch: int
    length: int
    found: Measurement

    @property
    def seconds(self) -> float:
        """Of a step."""
        return median(self.found.seconds)

    @property
    def tokens(self) -> float:
        """Sampled in a step."""
        return self.batch * (self.found.response_tokens or self.length)


@dataclass
class Growth:
    """Everything measured in one run."""

    given: argparse.Namespace
    points: list[Point] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    """The machine's load average after each measurement; above the threads, others slowed it down."""

    @property
    def longer(self) -> list[Point]:
        """Those whose responses get longer."""
        return [point for point in self.points if point.batch == BATCH]

    @property
    def larger(self) -> list[Point]:
        """Those whose responses get more."""
        return [point for point in self.points if point.length == LENGTH]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    given = parsed(arguments)
    growth = Growth(given)
    try:
        with nursery(given.threads) as (folder, children):
            if problem := measure(growth, folder, children):
                print(problem, file=sys.stderr)
                return 1
    except KeyboardInterrupt:
        print(f"\nInterrupted after {len(growth.points)} measurements; no table was written.", file=sys.stderr)
        return 130
    text = report(growth)
    print(f"\n{text}")
    if given.whole:
        draw(growth, PICTURE)
        readme = HERE / "README.md"
        readme.write_text(written(readme.read_text("utf-8"), f"{text}\n\n![growth]({PICTURE.name})", "growth"), "utf-8")
        print(f"\nwritten into {readme}, with {PICTURE.name}")
    return 0


def measure(growth: Growth, folder: Path, children: Children) -> str:
    """Fill `growth` with measurements; returns why one failed, or nothing."""
    given = growth.given
    loads = [Load(responses=BATCH, response_tokens=length) for length in given.lengths]
    loads += [Load(responses=batch, response_tokens=LENGTH) for batch in given.batches if batch != BATCH]
    most = Load(responses=max(load.responses for load in loads))
    code, _ = children.run("workload.py", folder, "--sizes", given.size, "--steps", given.steps, *most.options)
    if code:
        return children.last_words()
    for load in sorted(loads, key=lambda load: (load.responses, load.response_tokens)):
        found, problem = measured(children, "ours", Task("rloo", folder, given.size, given.dtype, given.steps, load))
        if found is None:
            return f"{load.responses} responses of {load.response_tokens} tokens: {problem}"
        growth.points.append(Point(load.responses, load.response_tokens, found))
        growth.loads.append(os.getloadavg()[0])
        print(row(growth.points[-1]), flush=True)
    return ""


def report(growth: Growth) -> str:
    """Machine, versions and model in a paragraph, how much dearer the dearest is, and a table."""
    given = growth.given
    shown = ", ".join(f"{name} {number}" for name, number in versions().items() if name != "trl")
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, {given.threads} threads. {shown}. rloo, {given.size}, "
        f"{given.dtype}. Median of {given.steps} steps. "
        f"Load average {min(growth.loads):.1f} to {max(growth.loads):.1f}.",
        "",
        *(f"- {sentence}" for sentence in (compared(growth.longer, "length"), compared(growth.larger, "batch"))),
        "",
        "| responses | tokens each | s a step (least to most) | responses/s | tokens/s | peak MB (above start) |",
        "|---|---|---|---|---|---|",
        *map(row, growth.points),
    ]
    return "\n".join(lines)


def compared(points: Sequence[Point], what: str) -> str:
    """What the last point costs against the first, whose `what` (length or batch) is the smaller."""
    first, last = min(points, key=lambda point: point.tokens), max(points, key=lambda point: point.tokens)
    times = getattr(last, what) / getattr(first, what)
    slower, more = last.seconds / first.seconds, last.found.growth_mb / first.found.growth_mb
    return f"{times:g} times the {what}: {slower:.1f} times the seconds, {more:.2f} times the memory above the start."


def row(point: Point) -> str:
    """The table's line of a measurement."""
    found, seconds = point.found, point.seconds
    cells = [
        point.batch,
        f"{point.tokens / point.batch:.1f}",
        f"{seconds:.3f} ({min(found.seconds):.3f} to {max(found.seconds):.3f})",
        f"{point.batch / seconds:.1f}",
        f"{point.tokens / seconds:.0f}",
        f"{found.peak_mb:.0f} ({found.growth_mb:.0f})",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def draw(growth: Growth, path: Path) -> None:
    """Responses a second and memory over length and over batch, as an SVG."""
    from matplotlib import rc_context

    from components.plots import BLUE, GOLD, STYLE, new_figure

    with rc_context(STYLE | {"svg.fonttype": "none"}):
        figure = new_figure(9, 5)
        axes = figure.subplots(2, 2, sharex="col")
        columns: list[tuple[str, list[Point], str]] = [
            (f"tokens a response ({BATCH} responses)", growth.longer, "length"),
            (f"responses ({LENGTH} tokens each)", growth.larger, "batch"),
        ]
        for (speed, memory), (label, points, what) in zip(axes.T, columns, strict=True):
            places = sorted(points, key=lambda point: getattr(point, what))
            over: list[Any] = [getattr(point, what) for point in places]
            rates, sizes = ([p.batch / p.seconds for p in places], [p.found.growth_mb for p in places])
            for axis, values, colour in ((speed, rates, BLUE), (memory, sizes, GOLD)):
                axis.plot(over, values, "o-", color=colour)
                axis.set_ylim(0, 1.1 * max(values))
            memory.set_xscale("log", base=2)
            memory.set_xticks(over, [str(place) for place in over])
            memory.set_xlabel(label)
        axes[0, 0].set_ylabel("responses a second")
        axes[1, 0].set_ylabel("MB above the start")
        figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `whole` where the run is the one that README.md shows."""
    parser = argparse.ArgumentParser(prog="growth.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the shortest lengths and the smallest batches")
    parser.add_argument("--size", choices=SIZES, default="7m")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--steps", type=positive, default=3, help="measured after the first; 3 by default")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1, help="all cores by default")
    given = parser.parse_args(arguments)
    given.lengths, given.batches = (QUICK_LENGTHS, QUICK_BATCHES) if given.quick else (LENGTHS, BATCHES)
    given.whole = not given.quick and (given.size, given.dtype) == ("7m", "fp32")
    return given


if __name__ == "__main__":
    sys.exit(main())
