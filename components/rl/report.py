"""The report of rl: one page with what was learned, what went wrong, and every number over the rollouts."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from components.artifacts import Metrics
from components.monitoring import Alert
from components.pages import number, render
from components.parsing import flattened
from components.rl.curves import History, Scatter, draw_constraint, draw_curves
from components.rl.profile import draw_phases, phase_totals

_TEMPLATE = Path(__file__).with_name("report.html.j2")


class Change(NamedTuple):
    """A metric at the start and at the end (means over a tenth of the rollouts) and its extremes."""

    metric: str
    first: float
    last: float
    lowest: float
    highest: float


def write_report(
    path: Path, settings: Mapping[str, Any], history: History, scatter: Scatter | None, alerts: Sequence[Alert]
) -> None:
    """Write the page to `path`; the same arguments give the same file.

    `settings` is RLSettings as plain values, `history` the metrics of every rollout in order, `scatter` (reward,
    cost) of the responses of the first and of the last rollout, None without a cost model.
    """
    algorithm = settings["algorithm"]
    marks = sorted({alert.update for alert in alerts})
    page = render(
        _TEMPLATE,
        algorithm=algorithm["name"],
        facts=_facts(settings, history),
        alerts=alerts,
        constraint=draw_constraint(history, scatter, algorithm, marks),
        curves=draw_curves(history, marks),
        phases=phase_totals(history),
        profile=draw_phases(history, marks),
        changes=_changes(history),
        tenth=_tenth(history),
        settings=list(flattened(settings)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _facts(settings: Mapping[str, Any], history: History) -> list[tuple[str, str]]:
    """What a reader wants to know first, as far as it was measured."""
    last: Metrics = history[-1][1] if history else {}
    facts = [("Rollouts", f"{len(history):,}")]
    for metric, label in (("data/samples", "Samples"), ("data/tokens", "Tokens")):
        if metric in last:
            facts.append((label, f"{last[metric]:,.0f}"))
    if history and all("perf/seconds" in row for _, row in history):
        facts.append(("Minutes", f"{sum(row['perf/seconds'] for _, row in history) / 60:,.1f}"))
    if "loss/skipped_updates" in last:
        facts.append(("Skipped updates", f"{last['loss/skipped_updates']:,.0f}"))
    ends = {change.metric: change.last for change in _changes(history)}
    for metric, label in (
        ("rollout/score", "Score"),
        ("rollout/cost", "Cost"),
        ("rollout/kl_k3", "KL, nats per response"),
        ("policy/pair_accuracy", "Pair accuracy"),
    ):
        if metric in ends:
            facts.append((label, number(ends[metric])))
    return [*facts, ("Seed", str(settings["seed"]))]


def _tenth(history: History) -> int:
    """Rollouts in a tenth of the run, at least one."""
    return math.ceil(len(history) / 10)


def _changes(history: History) -> list[Change]:
    """Every metric that was logged, by name; rollouts without it, or where it is no finite number, do not count."""
    names = sorted({name for _, row in history for name in row})
    first, last = history[: _tenth(history)], history[-_tenth(history) :]
    return [
        Change(name, _mean(first, name), _mean(last, name), min(values), max(values))
        for name in names
        if (values := _values(history, name))
    ]


def _values(history: History, metric: str) -> list[float]:
    return [row[metric] for _, row in history if metric in row and math.isfinite(row[metric])]


def _mean(history: History, metric: str) -> float:
    values = _values(history, metric)
    return sum(values) / len(values) if values else math.nan
