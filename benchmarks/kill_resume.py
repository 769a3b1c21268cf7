"""Runs of rl killed at random moments and started again: how many end as one that nobody killed.

    python benchmarks/kill_resume.py [--kills 50] [--seed 0]

Every algorithm in fp32 and bf16, on tiny models, in one process on the CPU, with a checkpoint after every second of 5
rollouts. SIGKILL comes at a moment drawn uniformly from the time that training takes when it is left alone; where it
came too late, it is drawn again. A killed run is started again, and weights (by digest), history, alerts and final
metrics are compared with those of the run that nobody killed. Exits 1 unless all are the same.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from components.rl.settings import RLSettings
from places import ENDING, LEARNING, OUTSIDE, SAMPLING, SAVING, Place
from starts import Ending, Start, Starts, Stop, ending
from tiny_models import ALGORITHMS, ROLLOUT_UPDATES, ROLLOUTS, make_inputs, silence, tiny_rl

DTYPES = ("fp32", "bf16")
MAX_DRAWS = 100


@dataclass(frozen=True)
class Kill:
    """A run that was killed and started again."""

    place: Place
    """What the kill fell on."""
    continued: bool
    """Whether it went on from a checkpoint; the other runs were killed before they had one, and began anew."""
    differing: tuple[str, ...]
    """What of its result is not that of the run that nobody killed."""


class Case:
    """One algorithm in one dtype, and how it ends when nobody kills it."""

    def __init__(
        self, starts: Starts, algorithm: str, dtype: str, inputs: Mapping[str, Path], folder: Path
    ) -> None:
        self.starts, self.inputs, self.folder = starts, inputs, folder
        self.settings: RLSettings = tiny_rl(algorithm, dtype)
        self.whole: Ending = starts.run("rl", self.settings, inputs, folder / "whole")
        self.span_s = training_s(folder / "whole")

    def kill(self, draws: random.Random, name: str) -> Kill:
        """Kill a run into the folder `name` at a random moment, and start it again."""
        folder, killed = self._killed(draws, name)
        again = self.starts.start("rl", self.settings, self.inputs, folder)
        if again.exit_code != 0:
            return Kill(killed.stopped, False, (f"exit code {again.exit_code}",))
        result, expected = ending(folder).result, self.whole.result
        differing = tuple(name for name in expected if result[name] != expected[name])
        return Kill(killed.stopped, again.ended.updates < ROLLOUTS * ROLLOUT_UPDATES, differing)

    def _killed(self, draws: random.Random, name: str) -> tuple[Path, Start]:
        for number in range(MAX_DRAWS):
            folder = self.folder / f"{name}.{number}"
            stop = Stop(0, 0, draws.uniform(0, self.span_s))
            start = self.starts.start("rl", self.settings, self.inputs, folder, stop)
            if start.exit_code == -signal.SIGKILL:
                return folder, start
            assert start.exit_code == 0, start.log
            self.span_s = training_s(folder)  # it came too late: the machine has become faster
        raise SystemExit(f"{self.folder}: {MAX_DRAWS} kills in a row came after the end of the run.")


def training_s(folder: Path) -> float:
    """Seconds from the beginning of the first rollout to the end of the last, and a tenth more for saving."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return 1.1 * float(rows[-1]["time"] - rows[0]["time"] + rows[0]["perf/seconds"])


def described(place: Place) -> str:
    """What a kill fell on, in a few words."""
    batch = f"batch {place.batch + 1}"
    match place.phase:
        case "sampling":
            return f"{batch} sampling"
        case "saving":
            return f"checkpoint after {batch}"
        case "learning" if place.batch_updates < ROLLOUT_UPDATES:
            return f"{batch} update {place.batch_updates + 1}"
        case "learning":
            return f"{batch} done"
    return "saving the model" if place.phase == ENDING else "after the end of training"


def main(arguments: list[str]) -> int:
    """The exit code: 0 if every killed run ended as the one that nobody killed."""
    parser = argparse.ArgumentParser(prog="kill_resume.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="how many, over all algorithms and dtypes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which they come")
    chosen = parser.parse_args(arguments)
    silence()
    draws, kills = random.Random(chosen.seed), list[Kill]()
    names = [(algorithm, dtype) for algorithm in ALGORITHMS for dtype in DTYPES]
    with tempfile.TemporaryDirectory(prefix="plumbline-") as scratch:
        starts, inputs = Starts(), make_inputs(Path(scratch))
        for number, (algorithm, dtype) in enumerate(names):
            share = range(number, chosen.kills, len(names))
            if not share:
                break
            case = Case(starts, algorithm, dtype, inputs, Path(scratch) / f"{algorithm}-{dtype}")
            kills += (own := [case.kill(draws, str(kill)) for kill in share])
            print(line(f"{algorithm:<11}{dtype}", own), flush=True)
    print(summary(kills))
    return int(any(kill.differing for kill in kills))


def line(label: str, kills: list[Kill]) -> str:
    """One line on the kills of one algorithm in one dtype."""
    same = sum(not kill.differing for kill in kills)
    places = ", ".join(
        described(kill.place) + (f" (differs: {', '.join(kill.differing)})" if kill.differing else "") for kill in kills
    )
    return f"{label}  {same} of {len(kills)}  {places}"


def summary(kills: list[Kill]) -> str:
    """How many recovered, and what the kills fell on."""
    phases = Counter(kill.place.phase for kill in kills)
    words = {
        SAMPLING: "making a batch",
        LEARNING: "learning from one",
        SAVING: "writing a checkpoint",
        ENDING: "saving the model",
        OUTSIDE: "after that",
    }
    fell = ", ".join(f"{phases[phase]} {words[phase]}" for phase in words if phases[phase])
    continued = sum(kill.continued for kill in kills)
    return (
        f"{fell}; {continued} continued from a checkpoint, {len(kills) - continued} began anew\n"
        f"{sum(not kill.differing for kill in kills)} of {len(kills)} recovered identically"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
