"""The gate: which thresholds a policy meets, and whether they are about numbers that exist."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

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
    """min, max or both."""
    at: str
    passed: bool


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


def checks(thresholds: Mapping[str, Bound], measures: Measures) -> list[Check]:
    """Each threshold held against its number; what could not be measured never passes."""
    return [_check(metric, bound, measures) for metric, bound in thresholds.items()]


def _check(metric: str, bound: Bound, measures: Measures) -> Check:
    interval = measures.interval(metric)
    value = measures.points[metric] if interval is None else getattr(interval, bound.at)
    limits = {"min": bound.min, "max": bound.max}
    passed = (bound.min is None or value >= bound.min) and (bound.max is None or value <= bound.max)
    given = {name: limit for name, limit in limits.items() if limit is not None}
    return Check(metric, value, given, bound.at, passed)


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
