"""Sampling ahead against sampling in turn, on the demo world: samples a second, and gold reward over staleness.

    python benchmarks/overlap.py RUN RUN RUN [--staleness 0,1,2,4] [--threads 2] [--keep FOLDER]

RUN is the folder of a finished demo run (`make run ARGS="seed=0"`, then 1 and 2): its data, policy, reward and cost
model are what rl starts from again, with the seed that is its place on the command line. For each of them, rl runs
in turn with one thread and with all threads, and ahead with every staleness and all threads shared, one run after the
other; each policy is then judged by the demo's own judge. The whole measurement writes its table and picture into
README.md beside this file; a part of it (--rollouts, fewer than three RUNs) is printed alone. With --keep, what is
finished in that folder is not measured again. Exits 1 when a run fails, 2 when nothing can be started.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from components.errors import InputError
from pipeline.overrides import resolve
from staleness import Run, draw, table
from tables import machine, written

HERE = Path(__file__).parent
SEEDS = 3
PICTURE = "overlap.svg"
OUTPUTS = {"data": "preprocess/data", "policy": "sft/model", "reward": "reward/model", "cost": "cost/model"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    given = parsed(arguments)
    if missing := [run / path for run in given.runs for path in OUTPUTS.values() if not (run / path).is_dir()]:
        print(f"{missing[0]}: no such folder. Give finished runs of the demo: make run ARGS=seed=0.", file=sys.stderr)
        return 2
    runs = []
    with tempfile.TemporaryDirectory(prefix="plumbline-overlap-") as scratch:
        for seed, inputs in enumerate(given.runs):
            for label, threads, staleness in settings(given.staleness, given.threads):
                folder = (given.keep or Path(scratch)) / f"{seed}-{label}"
                try:
                    runs.append(measured(folder, inputs, seed, staleness, threads, given.rollouts))
                except subprocess.CalledProcessError as error:
                    print(f"{label}, seed {seed}: exit code {error.returncode}; {error.stderr[-800:]}", file=sys.stderr)
                    return 1
                print(runs[-1].line(), flush=True)
    shown = f"{machine()}, {given.threads} threads.\n\n{table(runs)}"
    print(shown)
    if given.rollouts is None and len(given.runs) >= SEEDS:
        draw(runs, HERE / PICTURE)
        readme = HERE / "README.md"
        text = f"{shown}\n\n![Gold reward and samples a second over staleness]({PICTURE})"
        readme.write_text(written(readme.read_text("utf-8"), text, "overlap"), "utf-8")
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="overlap.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a finished demo run")
    parser.add_argument(
        "--staleness", default=(0, 1, 2, 4), type=lambda text: tuple(map(int, text.split(","))), help="0,1,2,4"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a run altogether")
    parser.add_argument("--rollouts", type=int, help="fewer than the demo's, to try the command")
    parser.add_argument("--keep", type=Path, help="a folder for the runs, which are then kept")
    return parser.parse_args(arguments)


def settings(staleness: Sequence[int], threads: int) -> list[tuple[str, int, int | None]]:
    """What is measured: a label, threads, and a staleness or none."""
    turns: list[tuple[str, int, int | None]] = [(f"turn-{number}", number, None) for number in sorted({1, threads})]
    return turns + [(f"ahead-{number}", threads, number) for number in staleness]


def measured(folder: Path, inputs: Path, seed: int, staleness: int | None, threads: int, rollouts: int | None) -> Run:
    """One run of rl and the evaluation of what it learned, in `folder`; read from there where both are finished."""
    paths = {name: inputs / path for name, path in OUTPUTS.items()}
    whole = resolve([Path("demo")], [f"seed={seed}"])
    changed: dict[str, Any] = {} if staleness is None else {"overlap": {"staleness": staleness}}
    changed |= {} if rollouts is None else {"rollouts": rollouts}
    rl = whole.rl.model_dump(mode="json", exclude_none=True) | changed
    step("rl", rl, paths | {"model": folder / "rl" / "model"}, threads)
    judged = {"baseline": paths["policy"], "policy": folder / "rl" / "model", "report": folder / "evaluate" / "report"}
    step("evaluate", whole.evaluate.model_dump(mode="json", exclude_none=True), paths | judged, 1)
    history = lines(folder / "rl" / "model.metrics" / "metrics.jsonl")
    samples = lines(folder / "evaluate" / "report" / "samples.jsonl")
    return Run(seed, staleness, threads, history, [verdict(sample["policy"]["gold"]) for sample in samples])


def step(name: str, chosen: dict[str, Any], paths: dict[str, Path], threads: int) -> None:
    """Run a step into its last path, unless that is there. Raises CalledProcessError when it fails."""
    output = list(paths.values())[-1]
    if output.exists():
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.parent / "settings.yaml"
    file.write_text(yaml.safe_dump(chosen), "utf-8")
    options = [text for option, path in paths.items() for text in (f"--{option}", str(path))]
    command = [sys.executable, "-m", "components", name, "--settings", str(file), *options]
    variables = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE.parent), "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, env=os.environ | variables, check=True, capture_output=True, text=True)


def verdict(gold: dict[str, bool | None]) -> float:
    """1 for a response as it should be: helpful, or to a prompt that must be refused, not harmful; else 0."""
    return float(bool(gold["helpful"]) if gold["helpful"] is not None else not gold["harmful"])


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
