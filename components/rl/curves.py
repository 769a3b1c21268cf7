"""The pictures of an rl run's report: metrics over rollouts, the constraint, reward against cost."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

from components.artifacts import Metrics
from components.plots import BLUE, GOLD, INK, RED, SOFT, STYLE, Plot, finished, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

History = Sequence[tuple[int, Metrics]]
"""The number of a rollout and its metrics, in order."""
Scatter = Mapping[str, Sequence[tuple[float, float]]]
"""(reward, cost) of single responses, by which rollout they are of: `first`, `last`."""
COLOURS = (BLUE, GOLD, RED, SOFT)
MAX_MARKED = 60
"""Shorter runs show their points."""


class Curve(NamedTuple):
    """A panel: its title, its unit, and the metrics in it with their labels."""

    title: str
    unit: str
    metrics: Mapping[str, str]


NETWORKS = {"": "policy", "_value": "reward critic", "_cost_value": "cost critic"}
"""The networks, by the end of the names of the metrics that each of them has."""
CURVES = (
    Curve("Score", "normalised", {"rollout/score": "all responses", "rollout/best_score": "best of each prompt"}),
    Curve("KL to the reference", "nats per response", {"rollout/kl_k1": "k1", "rollout/kl_k3": "k3"}),
    Curve("Length", "tokens per response", {"rollout/length": "length"}),
    Curve("Responses that did not end", "share", {"rollout/missing_eos": "missing EOS"}),
    Curve("Entropy", "nats per token", {"policy/entropy": "entropy"}),
    Curve("Ratio gap at the first update", "|ratio - 1|", {"policy/first_ratio_gap": "largest gap"}),
    Curve(
        "Gap between sampler and trainer",
        "nats per token",
        {"sampler/logprob_gap": "mean", "sampler/logprob_gap_max": "largest"},
    ),
    Curve("Effective sample size", "share", {"sampler/effective": "of the weighted"}),
    Curve("Clipped ratios", "share", {"policy/clip_fraction": "clipped"}),
    Curve("Pairs in the right order", "share", {"policy/pair_accuracy": "accuracy"}),
    Curve(
        "Implicit rewards", "beta log-ratio", {"policy/chosen_reward": "chosen", "policy/rejected_reward": "rejected"}
    ),
    Curve("Groups without a difference", "share", {"policy/flat_groups": "flat groups"}),
    Curve("Unsafe responses", "share with a cost above 0", {"rollout/unsafe": "unsafe"}),
    Curve("Policy loss", "per term", {"loss/policy": "policy", "loss/kl": "KL", "loss/ptx": "PTX"}),
    Curve("Value loss", "per token", {"loss/value": "reward critic", "loss/cost_value": "cost critic"}),
    Curve(
        "Returns explained by the critics",
        "share of variance",
        {"value/value_explained": "reward critic", "value/cost_value_explained": "cost critic"},
    ),
    Curve("Gradient norm", "before clipping", {f"loss/grad_norm{tail}": label for tail, label in NETWORKS.items()}),
    Curve("Learning rate", "mean of the updates", {f"loss/lr{tail}": label for tail, label in NETWORKS.items()}),
    Curve("KL coefficient", "per token", {"policy/kl_coef": "coefficient"}),
)
"""The panels, in the page's order; one without data is left out."""


def draw_curves(history: History, marks: Sequence[int]) -> list[Plot]:
    """A picture for every panel with data; `marks` are the rollouts with an alert."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        return [_panel(curve, history, marks) for curve in CURVES if any(_series(history, m) for m in curve.metrics)]


def draw_constraint(
    history: History, scatter: Scatter | None, algorithm: Mapping[str, Any], marks: Sequence[int]
) -> list[Plot]:
    """J_C and its band against the limit, lambda, and rewards against costs, each where there is data for it.

    `algorithm` is PPOLagSettings as plain values, or another algorithm's.
    """
    from matplotlib import rc_context

    share = algorithm.get("constrain") == "unsafe"  # whose limit is no cost
    limits = [value for _, value in _series(history, "cost/limit")] if not share else []
    with rc_context(STYLE):
        plots = [_mean_cost(history, share, marks)] if _series(history, "cost/window_mean") else []
        if _series(history, "cost/lambda"):
            plots.append(_multiplier(history, algorithm.get("lambda_max"), marks))
        if scatter and any(scatter.values()):
            plots.append(_reward_and_cost(scatter, limits[-1] if limits else None))
    return plots


def over_rollouts(axes: "Axes", history: History, unit: str, marks: Sequence[int]) -> None:
    """The axes of something over rollouts; ticks on the lower edge where there was an alert."""
    from matplotlib.ticker import MaxNLocator

    first, last = history[0][0], history[-1][0]
    margin = 0.02 * max(1, last - first)
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("rollout")
    axes.set_ylabel(unit)
    edge = axes.get_xaxis_transform()
    heights = [0.0] * len(marks)
    triangles = axes.scatter(marks, heights, 49, RED, marker="^", clip_on=False, zorder=5, transform=edge)
    triangles.set_in_layout(False)  # the panel stays as it is without alerts


def _series(history: History, metric: str) -> list[tuple[int, float]]:
    """The metric where it was logged and is a finite number."""
    return [(number, row[metric]) for number, row in history if metric in row and abs(row[metric]) < float("inf")]


def _panel(curve: Curve, history: History, marks: Sequence[int]) -> Plot:
    figure = new_figure(5.2, 2.7)
    axes = figure.subplots()
    drawn = {label: series for metric, label in curve.metrics.items() if (series := _series(history, metric))}
    for (label, series), colour in zip(drawn.items(), COLOURS, strict=False):
        _line(axes, series, colour, label)
    axes.set_title(curve.title, loc="left", fontsize=11)
    over_rollouts(axes, history, curve.unit, marks)
    if len(drawn) > 1:
        axes.legend()
    return finished(figure, f"{curve.title} ({curve.unit}): {_told(drawn)}")


def _mean_cost(history: History, share: bool, marks: Sequence[int]) -> Plot:
    what, unit = ("share of unsafe responses", "share") if share else ("mean cost", "deviations of the cost model")
    figure = new_figure(10.4, 3.3)
    axes = figure.subplots()
    low, high = dict(_series(history, "cost/window_low")), dict(_series(history, "cost/window_high"))
    if banded := sorted(low.keys() & high.keys()):
        edges = [low[number] for number in banded], [high[number] for number in banded]
        axes.fill_between(banded, *edges, color=BLUE, alpha=0.22, linewidth=0, label="95 % band")
    mean = _series(history, "cost/window_mean")
    _line(axes, mean, BLUE, rf"{what} $J_C$")
    if limit := _series(history, "cost/limit"):
        axes.plot(*zip(*limit, strict=True), color=RED, linewidth=1.4, linestyle="--", label="limit")
    axes.set_title(f"{what.capitalize()} against its limit", loc="left", fontsize=11)
    over_rollouts(axes, history, unit, marks)
    axes.legend(ncols=3)
    told = [f"{what.capitalize()} J_C{' with its 95 % confidence band' if banded else ''}: {_told({'J_C': mean})}"]
    told += [f"limit {limit[-1][1]:.3g}"] if limit else []
    return finished(figure, ", ".join(told), wide=True)


def _multiplier(history: History, bound: float | None, marks: Sequence[int]) -> Plot:
    figure = new_figure(5.2, 3.3)
    axes = figure.subplots()
    series = _series(history, "cost/lambda")
    _line(axes, series, BLUE, "lambda")
    if bound is not None:
        axes.axhline(bound, color=RED, linewidth=1.4, linestyle="--", label="bound")
    axes.set_ylim(bottom=0)
    axes.set_title("Lambda", loc="left", fontsize=11)
    over_rollouts(axes, history, "weight of the cost", marks)
    axes.legend()
    return finished(figure, f"Lambda's path: {_told({'lambda': series})}")


def _reward_and_cost(scatter: Scatter, limit: float | None) -> Plot:
    figure = new_figure(5.2, 3.3)
    axes = figure.subplots()
    for (name, pairs), colour, marker in zip(scatter.items(), cycle((GOLD, BLUE)), cycle("so"), strict=False):
        rewards, costs = [reward for reward, _ in pairs], [cost for _, cost in pairs]
        points = axes.scatter(rewards, costs, s=12, color=colour, marker=marker, alpha=0.5, label=f"{name} rollout")
        points.set(linewidth=0, rasterized=True)
    axes.axhline(0, color=INK, linewidth=1)
    if limit:
        axes.axhline(limit, color=RED, linewidth=1.4, linestyle="--", label="limit")
    axes.set_title("Reward against cost", loc="left", fontsize=11)
    axes.set_xlabel("reward")
    axes.set_ylabel("cost")
    figure.legend(loc="outside lower center", ncols=3)
    means = "; ".join(_centre(name, pairs) for name, pairs in scatter.items() if pairs)
    return finished(figure, f"Single responses, unsafe above the line at 0. Means: {means}")


def _line(axes: "Axes", series: Sequence[tuple[int, float]], colour: str, label: str) -> None:
    marker = "o" if len(series) <= MAX_MARKED else None
    numbers, values = zip(*series, strict=True)
    axes.plot(numbers, values, color=colour, linewidth=1.6, marker=marker, markersize=2.6, label=label)


def _told(drawn: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """The ends of each line in words, for those who do not see it."""
    return "; ".join(_ends(label, [value for _, value in series]) for label, series in drawn.items())


def _ends(label: str, values: Sequence[float]) -> str:
    return f"{label} from {values[0]:.3g} to {values[-1]:.3g}, between {min(values):.3g} and {max(values):.3g}"


def _centre(name: str, pairs: Sequence[tuple[float, float]]) -> str:
    rewards, costs = zip(*pairs, strict=True)
    return f"{name} reward {sum(rewards) / len(pairs):.3g}, cost {sum(costs) / len(pairs):.3g}"
