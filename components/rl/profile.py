"""Where the time of a run went, from the metrics of its rollouts: a row for every phase, and a picture of them all."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from components.phases import PHASES, Phase
from components.plots import BLUE, GOLD, INK, RED, STYLE, Plot, finished, new_figure
from components.rl.curves import History, over_rollouts

WHAT: Mapping[Phase, str] = {
    "waited": "for a draft that another process makes, whose own phases are beside these",
    "weights": "the sampler takes the policy's weights",
    "prefill": "prompts are read",
    "decode": "responses are sampled; by a server: prompts are read too",
    "score": "rewards and costs",
    "reference": "log-probabilities under the reference",
    "read": "log-probabilities and values under the networks before their updates",
    "update": "forward and backward passes and optimiser steps",
    "ptx": "the same for demonstrations that are mixed in",
    "checkpoint": "checkpoints are written",
    "other": "all else: texts, advantages, metrics, logging",
}
COLOURS: Mapping[Phase, str] = {
    "waited": "#f2f4f7", "weights": "#a9c6e3", "prefill": "#6a9fd4", "decode": BLUE, "score": GOLD,
    "reference": "#e6d48f", "read": "#8a6fb0", "update": RED, "ptx": "#e39a94", "checkpoint": "#4a5361",
    "other": "#c3cad3",
}  # fmt: skip


class PhaseTotal(NamedTuple):
    """A phase over all rollouts."""

    phase: str
    what: str
    seconds: float
    share: float
    """Of the seconds of all rollouts; what another process did meanwhile counts too."""
    tokens_per_s: float | None
    """None where it deals with no tokens."""
    peak_mb: float | None
    """The most over the rollouts; None where it was not measured."""


def phase_totals(history: History) -> list[PhaseTotal]:
    """Every phase that was measured, in the order in which a rollout goes through them."""
    rows = [row for _, row in history]
    whole = sum(row.get("perf/seconds", 0.0) for row in rows)
    found = []
    for phase in PHASES:
        timed = [row for row in rows if f"perf/{phase}_s" in row]
        if not timed or not whole:
            continue
        seconds = sum(row[f"perf/{phase}_s"] for row in timed)
        tokens = sum(row.get(f"perf/{phase}_tokens_per_s", 0.0) * row[f"perf/{phase}_s"] for row in timed)
        peaks = [row[f"perf/{phase}_peak_mb"] for row in timed if f"perf/{phase}_peak_mb" in row]
        rate = tokens / seconds if tokens else None
        found.append(PhaseTotal(phase, WHAT[phase], seconds, seconds / whole, rate, max(peaks, default=None)))
    return found


def draw_phases(history: History, marks: Sequence[int]) -> list[Plot]:
    """The seconds of every rollout, its phases one upon another; `marks` are the rollouts with an alert.

    A line shows its length. Phases reach beyond it where another process was at work at the same time.
    """
    from matplotlib import rc_context

    totals = phase_totals(history)
    if not totals:
        return []
    with rc_context(STYLE):
        figure = new_figure(10.4, 3.3)
        axes = figure.subplots()
        edges = [history[0][0] - 0.5, *(number + 0.5 for number, _ in history)]
        low = [0.0] * len(history)
        for name in (phase for phase in PHASES if phase in {total.phase for total in totals}):
            high = [below + row.get(f"perf/{name}_s", 0.0) for below, (_, row) in zip(low, history, strict=True)]
            axes.stairs(high, edges, baseline=low, fill=True, color=COLOURS[name], label=name)
            low = high
        lengths = [row.get("perf/seconds", 0.0) for _, row in history]
        axes.stairs(lengths, edges, color=INK, linewidth=1, label="whole rollout")
        axes.set_title("Seconds of each rollout", loc="left", fontsize=11)
        over_rollouts(axes, history, "seconds", marks)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside right center", reverse=True)
        told = ", ".join(f"{total.phase} {total.seconds:.3g}" for total in totals)
        return [finished(figure, f"Seconds of each rollout by phase; in all {told}", wide=True)]
