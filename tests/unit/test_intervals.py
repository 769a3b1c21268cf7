"""Bootstrap intervals and calibration error."""

import math

import numpy as np
import pytest

from components.intervals import bootstrap, calibration_error


def test_the_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    trials = 300
    covered = 0
    for _ in range(trials):
        interval = bootstrap((generator.random(60) < 0.3).tolist())
        covered += interval.low <= 0.3 <= interval.high
    # Binomial deviation at 0.95 over 300 trials is 0.013; the percentile bootstrap covers a little less.
    assert 0.90 <= covered / trials <= 0.985


def test_the_width_is_that_of_the_normal_approximation_for_many_values() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, 2000)
    interval = bootstrap(values.tolist())
    half = 1.96 * values.std() / math.sqrt(2000)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.1)
    assert interval.n == 2000


def test_the_same_values_give_the_same_interval() -> None:
    assert bootstrap([0.0, 1.0, 1.0]) == bootstrap([0.0, 1.0, 1.0])


def test_equal_values_leave_no_doubt() -> None:
    assert bootstrap([0.25] * 8) == (0.25, 0.25, 0.25, 8)


def test_no_values_are_not_zero() -> None:
    interval = bootstrap([])
    assert math.isnan(interval.mean) and interval.n == 0


def test_calibration_error_by_hand() -> None:
    # Bin 0.6..0.7: stated 0.62 and 0.68 (mean 0.65), both right: gap 0.35, weight 1/2.
    # Bin 0.9..1.0: stated 0.9 and 1.0 (mean 0.95), one right: gap 0.45, weight 1/2. (0.35 + 0.45) / 2 = 0.4.
    assert calibration_error([0.62, 0.68, 0.9, 1.0], [True, True, True, False]) == pytest.approx(0.4)


def test_stated_probabilities_that_come_true_have_no_calibration_error() -> None:
    stated = [0.25] * 4 + [0.75] * 4
    happened = [True, False, False, False, True, True, True, False]
    assert calibration_error(stated, happened) == pytest.approx(0)
    assert math.isnan(calibration_error([], []))


def test_no_event_in_ten_is_less_sure_than_none_in_five_hundred() -> None:
    assert bootstrap([0.0] * 10)[:3] == (0.0, 0.0, pytest.approx(1.96**2 / (10 + 1.96**2)))
    assert bootstrap([0.0] * 500).high < 0.01
    assert bootstrap([1.0] * 10).low == pytest.approx(10 / (10 + 1.96**2))
    assert bootstrap([1.0] * 10).high == 1.0
