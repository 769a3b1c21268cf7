"""The table and the picture that `overlap.py` writes: what sampling ahead gains in speed, and what reward it costs."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.intervals import Interval, bootstrap
from components.plots import BLUE, GOLD, STYLE, new_figure

LATE = 10
"""The last so many batches are those whose effective sample size is shown."""


@dataclass(frozen=True)
class Run:
    """One run of rl, and what the gold judge says of its policy."""

    seed: int
    staleness: int | None
    """None where responses were sampled in turn."""
    threads: int
    history: list[dict[str, Any]]
    """metrics.jsonl."""
    gold: list[float]
    """1 or 0 for each held-out prompt; the prompts of one seed are the same in all runs."""

    @property
    def name(self) -> str:
        """What this is a run of."""
        if self.staleness is None:
            return f"in turn, {self.threads} thread{'s' * (self.threads > 1)}"
        return f"ahead, staleness {self.staleness}"

    @property
    def speed(self) -> float:
        """Samples a second from the end of the first batch on, by the clock."""
        first, *later = self.history
        return float(sum(row["rollout/samples"] for row in later) / (later[-1]["time"] - first["time"]))

    def late(self, metric: str) -> float:
        """The mean of a metric over the last batches; NaN where there is none."""
        rows = [row[metric] for row in self.history[-LATE:] if metric in row]
        return statistics.mean(rows) if rows else float("nan")

    def line(self) -> str:
        """One line on a run that has just ended."""
        return (
            f"seed {self.seed}  {self.name:<20} {self.speed:6.1f} samples/s, gold {statistics.mean(self.gold):.3f}, "
            f"waited {self.late('perf/waited_s'):.2f} s, idle {self.late('perf/idle_s'):.2f} s a batch"
        )


def table(runs: Sequence[Run]) -> str:
    """A row for every way to run: speed beside the fastest way in turn, gold reward, and how far the two are apart."""
    groups = {name: [run for run in runs if run.name == name] for name in dict.fromkeys(run.name for run in runs)}
    base = max((group for group in groups.values() if group[0].staleness is None), key=speed)
    lines = [
        "| responses are sampled | samples/s (each seed) | times as fast (each seed) | gold reward | difference | "
        "effective sample size | gap, nats |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(name, group, base) for name, group in groups.items())])


def speed(group: Sequence[Run]) -> float:
    """The median of the runs' speeds."""
    return statistics.median(run.speed for run in group)


def _row(name: str, group: Sequence[Run], base: Sequence[Run]) -> str:
    ratios = [run.speed / other.speed for run, other in zip(group, base, strict=True)]
    gaps = [a - b for run, other in zip(group, base, strict=True) for a, b in zip(run.gold, other.gold, strict=True)]
    cells = [
        name,
        f"{speed(group):.1f} ({', '.join(f'{run.speed:.1f}' for run in group)})",
        f"{statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})",
        _shown(gold(group)),
        "" if group is base else _shown(bootstrap(gaps), "+"),
        *(_late(group, metric) for metric in ("sampler/effective", "sampler/logprob_gap")),
    ]
    return f"| {' | '.join(cells)} |"


def gold(group: Sequence[Run]) -> Interval:
    """The share of responses that are as they should be, over the prompts of all seeds."""
    return bootstrap([value for run in group for value in run.gold])


def _shown(interval: Interval, sign: str = "") -> str:
    return f"{interval.mean:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def _late(group: Sequence[Run], metric: str) -> str:
    value = statistics.mean(run.late(metric) for run in group)
    return "" if value != value else f"{value:.3g}"


def draw(runs: Sequence[Run], path: Path) -> None:
    """The picture: gold reward with its interval, and samples a second, over staleness."""
    from matplotlib import rc_context

    groups: dict[int, list[Run]] = {}
    for run in runs:
        if run.staleness is not None:
            groups.setdefault(run.staleness, []).append(run)
    places, shares = list(groups), [gold(group) for group in groups.values()]
    with rc_context(STYLE):
        figure = new_figure(7, 3)
        left, right = figure.subplots(1, 2)
        reach = [[x.mean - x.low for x in shares], [x.high - x.mean for x in shares]]
        left.errorbar(places, [x.mean for x in shares], yerr=reach, color=BLUE, marker="o", capsize=3)
        left.set(xlabel="staleness, batches", ylabel="gold reward", xticks=places)
        right.plot(places, [speed(group) for group in groups.values()], color=GOLD, marker="o")
        right.set(xlabel="staleness, batches", ylabel="samples a second", xticks=places)
        right.set_ylim(bottom=0)
        figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")
