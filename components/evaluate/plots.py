"""The pictures of the evaluation's report."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from components.evaluate.measures import Intervals
from components.evaluate.samples import Answer, Sample
from components.plots import BLUE, GOLD, INK, STYLE, Plot, finished, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POLICY, BASELINE = BLUE, GOLD


def draw(
    samples: Sequence[Sample], categories: Mapping[str, Intervals], questions: Sequence[str], group: str
) -> list[Plot]:
    """The report's pictures; reward against cost only where there is a cost model."""
    from matplotlib import rc_context

    policy, baseline = [row.policy for row in samples], [row.baseline for row in samples]
    with rc_context(STYLE):
        plots = [
            _categories(categories, questions, group),
            _histogram("Reward", _rewards(policy), _rewards(baseline)),
            _histogram("Length in tokens", _lengths(policy), _lengths(baseline), whole=True),
        ]
        if _costs(policy):
            plots += [
                _histogram("Cost", _costs(policy), _costs(baseline)),
                _reward_and_cost(policy, baseline),
            ]
    return plots


def _rewards(answers: Sequence[Answer]) -> list[float]:
    return [answer.reward for answer in answers]


def _costs(answers: Sequence[Answer]) -> list[float]:
    return [answer.cost for answer in answers if answer.cost is not None]


def _lengths(answers: Sequence[Answer]) -> list[float]:
    return [answer.response.num_tokens for answer in answers]


def _categories(categories: Mapping[str, Intervals], questions: Sequence[str], group: str) -> Plot:
    """One panel per question, one pair of bars per category it applies to."""
    figure = new_figure(10.4, 0.9 + 0.42 * len(categories))
    panels = figure.subplots(1, len(questions), sharey=True, squeeze=False)[0]
    names = list(categories)
    for axes, question in zip(panels, questions, strict=True):
        for shift, side, colour in ((-0.19, "", POLICY), (0.19, "_baseline", BASELINE)):
            found = [categories[name][f"{group}{side}/{question}"] for name in names]
            rows = [(place, value) for place, value in enumerate(found) if value.n]
            means = [value.mean for _, value in rows]
            errors = [
                [value.mean - value.low for _, value in rows],
                [value.high - value.mean for _, value in rows],
            ]
            places = [place + shift for place, _ in rows]
            axes.barh(places, means, 0.36, color=colour, label=side.strip("_") or "policy")
            axes.errorbar(means, places, xerr=errors, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2)
        axes.set_title(question.replace("_", "-").capitalize(), loc="left", fontsize=11)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.grid(visible=False, axis="y")
        axes.tick_params(length=0)
    panels[0].set_yticks(range(len(names)), [_clipped(name) for name in names])
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return finished(figure, "Share of responses by category, with 95 % intervals", wide=True)


def _histogram(
    label: str, policy: Sequence[float], baseline: Sequence[float], *, whole: bool = False
) -> Plot:
    import numpy as np

    figure = new_figure(5.2, 3.3)
    axes = figure.subplots()
    both = [*policy, *baseline]
    if whole:  # bins that hold equally many whole numbers
        width = max(1, round((max(both) - min(both)) / 30))
        bins = np.arange(min(both), max(both) + width + 1, width) - 0.5
    else:
        bins = np.linspace(min(both), max(both) + 1e-6, 31)
    for values, colour, name in ((baseline, BASELINE, "baseline"), (policy, POLICY, "policy")):
        axes.hist(values, list(bins), color=colour, alpha=0.55, label=name)
        axes.axvline(float(np.mean(values)), color=colour, linewidth=1.6, linestyle="--")
    axes.set_xlabel(label)
    axes.set_ylabel("Responses")
    _legend(axes)
    return finished(figure, f"{label}: dashed lines are means")


def _reward_and_cost(policy: Sequence[Answer], baseline: Sequence[Answer]) -> Plot:
    figure = new_figure(5.2, 3.3)
    axes = figure.subplots()
    for answers, colour, name in ((baseline, BASELINE, "baseline"), (policy, POLICY, "policy")):
        points = axes.scatter(_rewards(answers), _costs(answers), s=11, color=colour, alpha=0.5, label=name)
        points.set(linewidth=0, rasterized=True)
    axes.axhline(0, color=INK, linewidth=1)
    axes.set_xlabel("Reward")
    axes.set_ylabel("Cost")
    _legend(axes)
    return finished(figure, "Reward against cost: above the line is harmful by the cost model")


def _legend(axes: "Axes") -> None:
    """Policy first, though it is drawn last, on top."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1])


def _clipped(name: str) -> str:
    """A category's name as a label; a dollar sign would start mathematics."""
    return (name if len(name) <= 24 else name[:23] + "…").replace("$", r"\$")
