"""What moves by itself: the KL coefficient to its target, lambda to the cost limit."""

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from components.rl.algorithm_settings import PidSettings, PolicyGradientSettings, PPOLagSettings
from components.rl.controllers import (
    CostWindow,
    KLController,
    LogMultiplier,
    Multiplier,
    PidMultiplier,
    build_multiplier,
)


def alone(tensor: Tensor) -> Tensor:
    return tensor


def kl_controller(**fields: Any) -> KLController:
    settings: dict[str, Any] = {"kl_coef": 0.1, "kl_target": 2.0, "kl_horizon": 100}
    return KLController(PolicyGradientSettings(**(settings | fields)), alone)


def log_multiplier(**fields: Any) -> LogMultiplier:
    return LogMultiplier(PPOLagSettings(**fields))


def pid_multiplier(kp: float = 0.0, ki: float = 0.0, kd: float = 0.0, smoothing: float = 0.0, **fields: Any) -> Any:
    gains = PidSettings(kp=kp, ki=ki, kd=kd, smoothing=smoothing)
    return PidMultiplier(PPOLagSettings(multiplier="pid", pid=gains, **fields))


# --- the KL coefficient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "error"),
    [
        ([[2.0, 0.2], [2.0, 9.0]], 0.05),  # 4.2 nats on two responses: 2.1 / 2 - 1
        ([[2.0, -0.4], [2.0, 9.0]], -0.1),
        ([[20.0, 0.0], [2.0, 9.0]], 0.2),  # 11 / 2 - 1, clipped
        ([[-20.0, 0.0], [2.0, 9.0]], -0.2),
    ],
)
def test_the_coefficient_s_step_by_hand(kl: list[list[float]], error: float) -> None:
    controller = kl_controller()
    controller.update(torch.tensor(kl), torch.tensor([[True, True], [True, False]]))
    assert controller.coef == pytest.approx(0.1 * (1 + error * 2 / 100))


def test_the_kl_per_response_is_that_of_all_processes() -> None:
    other = torch.tensor([1.0, 3.0])  # another process has three responses and 1 nat
    controller = KLController(
        PolicyGradientSettings(kl_coef=0.1, kl_target=1.0, kl_horizon=100), lambda tensor: tensor + other
    )
    controller.update(torch.tensor([[3.4]]), torch.tensor([[True]]))  # 4.4 nats on 4 responses
    assert controller.coef == pytest.approx(0.1 * (1 + 0.1 * 4 / 100))


def test_without_a_target_the_coefficient_stays() -> None:
    controller = kl_controller(kl_target=None)
    controller.update(torch.full((4, 2), 100.0), torch.ones(4, 2).bool())
    assert controller.coef == 0.1


@pytest.mark.parametrize("start", [1e-3, 10.0])
def test_the_coefficient_is_steered_to_the_target_from_both_sides(start: float) -> None:
    controller = kl_controller(kl_coef=start, kl_target=3.0, kl_horizon=100)
    mask, seen = torch.ones(16, 4).bool(), []
    for _ in range(500):
        kl = 0.6 / controller.coef  # the policy drifts the further, the less it costs
        seen.append(kl)
        controller.update(torch.full((16, 4), kl / 4), mask)
    assert seen[-1] == pytest.approx(3.0, rel=0.01)
    assert (seen[0] > 100) if start < 1 else (seen[0] < 0.1)
    gaps = [abs(math.log(kl / 3)) for kl in seen]
    assert all(after <= before + 1e-6 for before, after in pairwise(gaps)), "it overshoots"


@pytest.mark.parametrize("kl", [0.0, 100.0])
def test_one_rollout_moves_the_coefficient_by_a_fifth_at_most(kl: float) -> None:
    controller = kl_controller(kl_horizon=1)
    controller.update(torch.full((64, 1), kl), torch.ones(64, 1).bool())
    assert controller.coef == pytest.approx(0.1 * (1.2 if kl else 0.8))


def test_the_coefficient_survives_json() -> None:
    first, second = kl_controller(), kl_controller()
    first.update(torch.full((8, 1), 7.0), torch.ones(8, 1).bool())
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.coef == first.coef != 0.1


# --- the window of costs ---------------------------------------------------------------------------------------------


def test_the_mean_cost_and_its_interval_by_hand() -> None:
    mean, low, high = CostWindow(10, alone).add(torch.tensor([1.0, 2.0, 4.0]))
    half = 1.96 * math.sqrt((16 / 9 + 1 / 9 + 25 / 9) / 2 / 3)  # unbiased variance over 3 costs
    assert (mean, low, high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half))
    half = 1.96 * math.sqrt((1 + 1) / 1 / 2)
    assert CostWindow(10, alone).add(torch.tensor([1.0, 3.0])) == pytest.approx((2, 2 - half, 2 + half))


def test_the_window_forgets_the_oldest_costs() -> None:
    window = CostWindow(3, alone)
    window.add(torch.tensor([50.0, 1.0]))
    assert window.add(torch.tensor([2.0, 6.0]))[0] == 3
    assert list(window.costs) == [1, 2, 6]


def test_one_cost_has_an_interval_of_no_width_and_equal_costs_too() -> None:
    assert CostWindow(3, alone).add(torch.tensor([4.0])) == (4, 4, 4)
    for cost in (0.1, 0.7, 1 / 3, 123.456):  # rounding takes some of their variances below zero
        for count in range(2, 12):
            mean, low, high = CostWindow(20, alone).add(torch.full((count,), cost))
            assert low <= mean <= high and high - low == pytest.approx(0, abs=1e-5)


def test_the_interval_is_that_of_the_costs_of_all_processes() -> None:
    both = CostWindow(10, alone).add(torch.tensor([1.0, 2.0, 4.0, -3.0]))
    other = torch.tensor([2.0, 1.0, 25.0], dtype=torch.float64)  # another process holds 4 and -3
    assert CostWindow(10, lambda t: t + other).add(torch.tensor([1.0, 2.0])) == pytest.approx(both)


# --- lambda ----------------------------------------------------------------------------------------------------------


def test_a_multiplier_is_what_the_settings_name_and_starts_where_they_say() -> None:
    for name, kind in (("log", LogMultiplier), ("pid", PidMultiplier)):
        made = build_multiplier(PPOLagSettings(multiplier=name, lambda_init=0.7))  # type: ignore[arg-type]
        assert type(made) is kind and made.value == pytest.approx(0.7)


def test_the_logarithmic_step_by_hand() -> None:
    multiplier = log_multiplier(lambda_init=2.0, lambda_lr=0.3, cost_limit=0.5)
    multiplier.update(1.0)
    assert multiplier.value == pytest.approx(2 * math.exp(0.3 * 2 * 0.5))
    before = multiplier.value
    multiplier.update(0.0)
    assert multiplier.value == pytest.approx(before * math.exp(0.3 * before * -0.5))


def test_the_logarithm_is_bounded_above() -> None:
    multiplier = log_multiplier(lambda_init=2.0, lambda_lr=1.0, lambda_max=3.0)
    multiplier.update(10.0)
    assert multiplier.value == pytest.approx(3.0)


def test_the_proportional_term_by_hand() -> None:
    multiplier = pid_multiplier(kp=0.5, smoothing=0.8, cost_limit=1.0, lambda_init=0.25)
    multiplier.update(3.0)  # the first error is taken as it is: 0.25 + 0.5 * 2
    assert multiplier.value == pytest.approx(1.25)
    multiplier.update(2.0)  # 0.8 * 2 + 0.2 * 1 = 1.8
    assert multiplier.value == pytest.approx(0.25 + 0.5 * 1.8)


def test_the_integral_term_by_hand() -> None:
    multiplier = pid_multiplier(ki=0.1, cost_limit=-1.0, lambda_init=1.0)
    for cost, expected in ((1.0, 1.2), (0.0, 1.3), (-4.0, 1.0), (-2.0, 0.9)):
        multiplier.update(cost)
        assert multiplier.value == pytest.approx(expected)


def test_the_derivative_term_brakes_a_rise_and_not_a_fall() -> None:
    multiplier = pid_multiplier(kd=2.0, smoothing=0.5, lambda_init=0.5)
    # smoothed costs 1, 2, 1.5, 2.75
    for cost, expected in ((1.0, 0.5), (3.0, 0.5 + 2 * 1.0), (1.0, 0.5), (4.0, 0.5 + 2 * 1.25)):
        multiplier.update(cost)
        assert multiplier.value == pytest.approx(expected)


def test_all_three_terms_add_up() -> None:
    multiplier = pid_multiplier(kp=0.5, ki=0.1, kd=2.0, lambda_init=1.0, lambda_max=50.0)
    multiplier.update(2.0)
    multiplier.update(3.0)
    assert multiplier.value == pytest.approx(0.5 * 3 + (1 + 0.2 + 0.3) + 2 * 1)


def test_the_controller_keeps_its_bounds() -> None:
    multiplier = pid_multiplier(kp=3.0, ki=0.1, lambda_init=1.0, lambda_max=4.0)
    multiplier.update(100.0)
    assert (multiplier.value, multiplier.integral) == (4.0, 4.0)
    multiplier.update(-100.0)
    assert (multiplier.value, multiplier.integral) == (0.0, 0.0)
    multiplier.update(0.5)
    assert multiplier.value == pytest.approx(3 * 0.5 + 0.1 * 0.5)


@pytest.mark.parametrize("long", [1.0, -1.0])
def test_a_long_violation_does_not_wind_the_controller_up(long: float) -> None:
    multiplier = pid_multiplier(ki=0.5, lambda_init=1.0, lambda_max=2.0)
    for _ in range(1000):
        multiplier.update(long)
    assert multiplier.value == (2.0 if long > 0 else 0.0)
    multiplier.update(-long)
    assert multiplier.value == pytest.approx(1.5 if long > 0 else 0.5)  # at once, not after 1000 steps


@pytest.mark.parametrize("name", ["log", "pid"])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_multiplier_survives_json_and_continues_exactly(name: Any, steps: int) -> None:
    first, second = (build_multiplier(PPOLagSettings(multiplier=name)) for _ in range(2))
    for step in range(steps):
        first.update(math.sin(step) + 0.5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.value == first.value
    for cost in (0.7, -0.2, 1.1):
        first.update(cost)
        second.update(cost)
        assert second.value == first.value


def costs_under(multiplier: Multiplier, steps: int) -> list[float]:
    """Mean costs of a policy that answers lambda slowly: a thirtieth of the way to 2 - lambda at every update."""
    cost, seen = 2.0, []
    for _ in range(steps):
        multiplier.update(cost)
        cost += 0.03 * (2.0 - multiplier.value - cost)
        seen.append(cost)
    return seen


def test_the_controller_settles_at_the_limit_with_less_oscillation_than_the_logarithm() -> None:
    log, pid = (
        costs_under(build_multiplier(PPOLagSettings(multiplier=name, lambda_max=20.0)), 1500)  # type: ignore[arg-type]
        for name in ("log", "pid")
    )
    assert log[-1] == pytest.approx(0, abs=1e-4) and pid[-1] == pytest.approx(0, abs=1e-4)
    overshoot = {name: -min(costs) for name, costs in (("log", log), ("pid", pid))}
    swing = {name: max(costs[200:300]) - min(costs[200:300]) for name, costs in (("log", log), ("pid", pid))}
    assert 0 <= overshoot["pid"] < overshoot["log"] / 2
    assert 0 <= swing["pid"] < swing["log"] / 3
