"""The gate: which thresholds a policy meets, and whether they are about numbers that exist."""

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from components.champion import Champion
from components.errors import InputError
from components.evaluate.measures import Measures
from components.evaluate.settings import Bound

KEY = "evaluate.thresholds"


@dataclass(frozen=True, slots=True)
class Check:
    """One threshold and what was measured."""

    metric: str
    value: float
    """NaN where nothing could be measured."""
    bound: dict[str, float]
    """min, max or both; over a champion, its number is added."""
    at: str
    passed: bool
    over: str = ""
    """The version of the champion that the bound is over; empty: over none."""


def check_names(
    thresholds: Mapping[str, Bound],
    means: Collection[str],
    points: Collection[str],
    categories: Collection[str],
) -> None:
    """Raises InputError for a threshold on a number that this evaluation will not have."""
    known = {*means, *points, *(f"{name}/{category}" for name in means for category in categories)}
    for metric, bound in thresholds.items():
        if metric not in known:
            raise InputError(_unknown(metric, [*means, *points], categories, known))
        if metric in points and bound.at != "mean":
            raise InputError(
                f"{KEY}: {metric} has no interval, and 'at' is {bound.at!r}; leave 'at' out for this metric."
            )


def check_champion(thresholds: Mapping[str, Bound], champion: Champion | None) -> None:
    """Raises InputError for a threshold over a champion whose evaluation had no such number."""
    for metric, bound in thresholds.items():
        if bound.over and champion is not None and metric not in champion.metrics:
            raise InputError(
                f"{KEY}: the champion {champion.version} was evaluated without {metric}, so nothing can be over it; "
                f"accepted: {', '.join(sorted(champion.metrics))}. Leave 'over' out here until a version that was "
                "evaluated with it is served."
            )


def checks(thresholds: Mapping[str, Bound], measures: Measures, champion: Champion | None = None) -> list[Check]:
    """Each threshold held against its number; what could not be measured never passes.

    A threshold over the champion passes where there is none yet.
    """
    return [_check(metric, bound, measures, champion) for metric, bound in thresholds.items()]


def _check(metric: str, bound: Bound, measures: Measures, champion: Champion | None) -> Check:
    interval = measures.interval(metric)
    value = measures.points[metric] if interval is None else getattr(interval, bound.at)
    if bound.over and champion is None:
        return Check(metric, value, {}, bound.at, passed=not math.isnan(value), over=bound.over)
    base = champion.metrics[metric] if bound.over and champion is not None else 0.0
    given = {name: base + margin for name, margin in (("min", bound.min), ("max", bound.max)) if margin is not None}
    passed = given.get("min", -math.inf) <= value <= given.get("max", math.inf)
    return Check(metric, value, given, bound.at, passed, champion.version if bound.over and champion else "")


def _unknown(metric: str, names: list[str], categories: Collection[str], known: Collection[str]) -> str:
    near = difflib.get_close_matches(metric, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    if metric.startswith("gold"):
        hint = hint or " The gold metrics need evaluate.judge."
    message = f"{KEY}: {metric!r} is not measured here.{hint} Accepted: {', '.join(sorted(names))}."
    if categories:
        listed = ", ".join(sorted(categories))
        message += f" Means also per category, as in eval/win_rate/{min(categories)}: {listed}."
    return message
