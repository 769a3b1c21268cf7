"""Means with their uncertainty: bootstrap intervals and calibration."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
WILSON_Z = 1.96


class Interval(NamedTuple):
    """A mean, the ends of its 95 % interval, and how many values it stands on."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean of `values` with a 95 % percentile-bootstrap interval (1000 resamples).

    Outcomes that are all 0 or all 1 leave a bootstrap nothing to resample; they get Wilson's interval (1927), so
    that ten safe responses do not look as sure as a thousand. No values give a mean of NaN and n = 0: absent is
    not zero.
    """
    array = np.asarray(values, dtype=float)
    if len(array) == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    if array.min() == array.max() and array[0] in (0.0, 1.0):
        reach = WILSON_Z**2 / (len(array) + WILSON_Z**2)
        return Interval(float(array[0]), 1 - reach if array[0] else 0.0, 1.0 if array[0] else reach, len(array))
    generator = np.random.default_rng(seed)
    means = array[generator.integers(0, len(array), (RESAMPLES, len(array)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(array.mean()), float(low), float(high), len(array))


def calibration_error(probabilities: Sequence[float], outcomes: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error: the mean gap between stated probability and observed share, over equal bins.

    Guo et al. 2017, equation 3.
    """
    stated, happened = np.asarray(probabilities, dtype=float), np.asarray(outcomes, dtype=float)
    if len(stated) == 0:
        return float("nan")
    places = np.minimum((stated * bins).astype(int), bins - 1)
    gaps = [
        abs(stated[places == place].mean() - happened[places == place].mean()) * (places == place).mean()
        for place in np.unique(places)
    ]
    return float(sum(gaps))
