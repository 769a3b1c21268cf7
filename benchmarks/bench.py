"""Our engine against TRL's trainers, alternately in one run: seconds a step and peak memory.

    python benchmarks/bench.py [--quick] [--what rloo,dpo] [--data pairs.jsonl]

The workload is made once; then every measurement is a process of its own, ours and the peer's next to one another,
each with the same weights, texts, lengths, dtype and number of threads. The whole run writes its table into README.md
beside this file; a part of it (--quick, --what, --sizes, --dtypes, --only) is printed alone, unless --readme says where
it goes. Exits 1 when a measurement fails, 2 when the run cannot start, 130 after Ctrl-C.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from children import HERE, Children, nursery
from measurement import WORK, Measurement, Task
from options import file, positive, some
from tables import LEFT_OUT, Cell, Run, progress, report, written

SYSTEMS = ("ours", "peer")
SIZES, DTYPES = ("1m", "3m", "7m", "40m"), ("fp32", "bf16")
LIBRARIES = ("torch", "transformers", "trl")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    given = parsed(arguments)
    if "peer" in given.systems and not installed("trl"):
        print(
            "trl is not installed, and the peer is TRL. Install the dev extra (`make setup`), or measure ours alone: "
            "--only ours.",
            file=sys.stderr,
        )
        return 2
    run = Run(given.steps, given.threads, versions(), given.data)
    try:
        with nursery(given.threads) as (folder, children):
            if problem := measure(run, given, folder, children):
                print(problem, file=sys.stderr)
                return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted after {len(run.cells)} measurements; no table was written.", file=sys.stderr)
        return 130
    text = report(run)
    print(f"\n{text}")
    if given.readme:
        given.readme.write_text(written(given.readme.read_text("utf-8"), text), "utf-8")
        print(f"\nwritten into {given.readme}")
    return int(any(cell.measurement is None for cell in run.cells))


def measure(run: Run, given: argparse.Namespace, folder: Path, children: Children) -> str:
    """Fill `run` with measurements; returns what is wrong with the data, or nothing."""
    sizes = ["--sizes", ",".join(given.sizes), "--steps", given.steps]
    code, _ = children.run("workload.py", folder, *sizes, *(["--data", given.data] if given.data else []))
    if code:
        return children.last_words()
    run.about = json.loads((folder / "about.json").read_text())
    works = [(size, dtype, what) for size in given.sizes for dtype in given.dtypes for what in given.what]
    for number, (size, dtype, what) in enumerate(works):
        task = Task(what, folder, size, dtype, given.steps)
        for system in given.systems if number % 2 == 0 else given.systems[::-1]:  # none always goes first
            cell = Cell(system, what, size, dtype, *measured(children, system, task))
            run.cells.append(cell)
            print(progress(cell), flush=True)
    return ""


def measured(
    children: Children, system: str, task: Task, limit_s: float | None = None
) -> tuple[Measurement | None, str]:
    """What a process measured, or None and why there is nothing: it failed, or took more than `limit_s` seconds."""
    try:
        code, output = children.run(f"{system}.py", *task.arguments, limit_s=limit_s)
    except subprocess.TimeoutExpired:
        return None, LEFT_OUT
    if code:
        return None, f"exit code {code}: {children.last_words()}"
    return Measurement(**json.loads(output.splitlines()[-1])), ""


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `readme` is None where the table is only printed."""
    parser = argparse.ArgumentParser(prog="bench.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 steps of the 7m model in fp32")
    parser.add_argument("--what", type=some(tuple(WORK)), default=tuple(WORK), help="such as rloo,dpo; all by default")
    parser.add_argument("--sizes", type=some(SIZES), help="7m,40m by default")
    parser.add_argument("--dtypes", type=some(DTYPES), help="fp32,bf16 by default")
    parser.add_argument("--steps", type=positive, help="measured after the first; 7 by default")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1, help="all cores by default")
    parser.add_argument("--data", type=file, help="pairs in any form that preprocess takes; made up by default")
    parser.add_argument("--only", choices=SYSTEMS, help="measure one side alone")
    parser.add_argument("--readme", type=file, help="where the table goes, between its markers")
    given = parser.parse_args(arguments)
    part = given.quick or given.only or given.sizes or given.dtypes or given.steps or given.what != tuple(WORK)
    given.readme = given.readme or (None if part else HERE / "README.md")
    given.sizes = given.sizes or (("7m",) if given.quick else ("7m", "40m"))
    given.dtypes = given.dtypes or (("fp32",) if given.quick else DTYPES)
    given.steps = given.steps or (3 if given.quick else 7)
    given.systems = (given.only,) if given.only else SYSTEMS
    return given


def versions() -> dict[str, str]:
    """Of Python and of the libraries that both sides use."""
    return {"Python": platform.python_version()} | {name: version(name) for name in LIBRARIES if installed(name)}


def installed(name: str) -> bool:
    """Whether a distribution of this name is there."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
