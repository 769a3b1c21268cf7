"""Our engine against TRL's trainers on one CUDA GPU, in bf16, within nine minutes: seconds a step and peak memory.

    python benchmarks/gpu.py [--what rloo,dpo] [--only ours] [--steps 4] [--seconds 520]

As bench.py, and with the same workload but for its size: a random Llama in the shape of a 0.5B model (hidden 896, 24
layers, 14 heads, 2 of them for keys and values, feed-forward 4864) with 32768 tokens, which makes 387 million
parameters. Needs torch, transformers and accelerate, and nothing else; without trl ours is measured alone. What is not
measured when the time is up is left out, and the table says so. The whole run writes its table into README.md beside
this file. `--device cpu --size 1m --steps 1` tries the command out where there is no GPU. Exits 1 when a measurement
fails, 2 when the run cannot start, 130 after Ctrl-C.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import SIZES, SYSTEMS, installed, measured, versions
from children import HERE, Children, nursery
from measurement import STANDARD, WORK, Load, Task
from options import file, positive, some
from tables import LEFT_OUT, NAMES, Cell, Run, progress, report, written

SIZE = "0.5b"
GPU_LOAD = Load(
    rows=64, responses=128, prompt_tokens=128, response_tokens=128, max_length=256, micro=64, decoded=128
)  # fmt: skip
"""What fills a GPU of 80 GB to a part, TRL's whole batches at once included."""
STEPS = 4
LIMIT_S = 520
"""Seconds for everything, so that no more than nine minutes pass from the command to its end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    given, started = parsed(arguments), time.monotonic()
    systems = [name for name in given.systems if name == "ours" or installed("trl")]
    if not systems:
        print("trl is not installed, and the peer is TRL. Install it, or measure ours: --only ours.", file=sys.stderr)
        return 2
    run = Run(given.steps, given.threads, versions(), None, load=given.load)
    try:
        with nursery(given.threads, given.device) as (folder, children):
            if problem := measure(run, given, systems, folder, children, started + given.seconds):
                print(problem, file=sys.stderr)
                return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted after {len(run.cells)} measurements; no table was written.", file=sys.stderr)
        return 130
    text = "\n\n".join(filter(None, [report(run), omissions(run)]))
    print(f"\n{text}\n\n{time.monotonic() - started:.0f} seconds in all")
    if given.readme:
        given.readme.write_text(written(given.readme.read_text("utf-8"), text, "gpu"), "utf-8")
        print(f"written into {given.readme}")
    return int(any(cell.measurement is None and cell.problem != LEFT_OUT for cell in run.cells))


def measure(
    run: Run, given: argparse.Namespace, systems: Sequence[str], folder: Path, children: Children, end: float
) -> str:
    """Fill `run` with measurements until the clock shows `end`; returns why none can be made, or nothing."""
    if given.device == "cuda":
        code, output = children.run("device.py")
        if code:
            return children.last_words()
        run.gpu = output.strip()
        print(run.gpu, flush=True)
    options = ["--sizes", given.size, "--steps", given.steps, *given.load.options]
    try:
        code, _ = children.run("workload.py", folder, *options, limit_s=max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return f"The workload was not made within --seconds {given.seconds}. Give more."
    if code:
        return children.last_words()
    run.about = json.loads((folder / "about.json").read_text())
    for number, what in enumerate(given.what):
        task = Task(what, folder, given.size, "bf16", given.steps, given.load, given.device)
        for system in systems if number % 2 == 0 else systems[::-1]:  # none always goes first
            left = end - time.monotonic()
            found, problem = measured(children, system, task, left) if left > 0 else (None, LEFT_OUT)
            run.cells.append(Cell(system, what, given.size, "bf16", found, problem))
            print(progress(run.cells[-1]), flush=True)
    return ""


def omissions(run: Run) -> str:
    """What the table lacks, as a sentence for each reason; empty where it lacks nothing."""
    missing = [cell for cell in run.cells if cell.measurement is None]
    late = [f"{WORK[cell.what]} ({NAMES[cell.system]})" for cell in missing if cell.problem == LEFT_OUT]
    sentences = [] if any(cell.system == "peer" for cell in run.cells) else ["TRL was not measured."]
    sentences += [f"Left out when the time was up: {', '.join(late)}."] if late else []
    sentences += [
        f"{WORK[cell.what]} ({NAMES[cell.system]}) failed: {cell.problem}."
        for cell in missing
        if cell.problem != LEFT_OUT
    ]
    return " ".join(sentences)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `readme` is None where the table is only printed."""
    parser = argparse.ArgumentParser(prog="gpu.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--what", type=some(tuple(WORK)), default=tuple(WORK), help="such as rloo,dpo; all by default")
    parser.add_argument("--steps", type=positive, default=STEPS, help=f"measured after the first; {STEPS} by default")
    parser.add_argument("--seconds", type=positive, default=LIMIT_S, help=f"for everything; {LIMIT_S} by default")
    parser.add_argument("--only", choices=SYSTEMS, help="measure one side alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the command out")
    parser.add_argument("--size", choices=(*SIZES, SIZE), default=SIZE, help=f"{SIZE} by default")
    parser.add_argument("--threads", type=positive, default=min(8, os.cpu_count() or 1), help="8 or all by default")
    parser.add_argument("--readme", type=file, help="where the table goes, between its markers")
    given = parser.parse_args(arguments)
    given.systems = (given.only,) if given.only else SYSTEMS
    whole = given.what == tuple(WORK) and given.device == "cuda" and given.size == SIZE and not given.only
    given.readme = given.readme or (HERE / "README.md" if whole else None)
    given.load = GPU_LOAD if given.device == "cuda" else STANDARD
    return given


if __name__ == "__main__":
    sys.exit(main())
