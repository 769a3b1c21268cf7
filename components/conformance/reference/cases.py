"""The inputs of the golden vectors on means, divergences, rewards and advantages.

Responses of one token, ties, groups laid out prompt after prompt, rubbish in the padding, log-ratios that clip.
"""

import itertools
from typing import Any, NamedTuple

from components.conformance.reference.tensors import NOT_FINITE, dirty, numbers, ragged, rows

MASK = ragged()


class Case(NamedTuple):
    """A vector without its results; `by` names the inputs that the scalar result is derived by."""

    name: str
    about: str
    source: str
    inputs: dict[str, Any]
    by: tuple[str, ...] = ()


def means() -> list[Case]:
    """Masked means and whitening."""
    values = rows(1, -3, 8)
    whitening = "Huang et al. 2024, The N+ implementation details of RLHF with PPO; 1e-8 is added to the variance"
    return [
        Case("masked_mean/tokens", "over tokens: a long response weighs more than a short one", "definition",
             {"values": dirty(values, MASK), "mask": MASK}),
        Case("masked_mean/not-finite-padding", "nan and infinity outside the mask do not spread", "definition",
             {"values": dirty(values, MASK, NOT_FINITE), "mask": MASK}),
        Case("whiten/shifted", "mean 0 and deviation 1 over the mask", whitening,
             {"values": dirty(values, MASK), "mask": MASK, "shift_mean": True}),
        Case("whiten/unshifted", "deviation 1, the mean stays: what rewards get", whitening,
             {"values": dirty(values, MASK), "mask": MASK, "shift_mean": False}),
        Case("whiten/all-equal", "no spread: zeros, not a division by zero", whitening,
             {"values": dirty([[2.5] * 6] * 4, MASK), "mask": MASK, "shift_mean": True}),
        Case("whiten/not-finite-padding", "nan and infinity outside the mask do not spread", whitening,
             {"values": dirty(values, MASK, NOT_FINITE), "mask": MASK, "shift_mean": True}),
    ]  # fmt: skip


def divergences() -> list[Case]:
    """Estimates of the KL, at ordinary log-ratios and at absurd ones."""
    source = "Schulman 2020, Approximating KL divergence"
    ordinary = {"logprobs": rows(2, -5, 0), "ref_logprobs": rows(3, -5, 0)}
    ordinary["ref_logprobs"][0][:2] = ordinary["logprobs"][0][:2]
    absurd = {"logprobs": [[-1.5, -45.0, -0.25, -31.0]], "ref_logprobs": [[-40.0, -0.5, -20.2, -11.1]]}
    return [
        Case(f"kl_estimate/{estimator}{variant}", about, source, {**inputs, "estimator": estimator})
        for variant, about, inputs in (
            ("", "both signs, and zero where policy and reference agree", ordinary),
            ("-clamped", "log-ratios beyond +-20 are held there before the exponential", absurd),
        )
        for estimator in ("k1", "k2", "k3")
    ]


def rewards() -> list[Case]:
    """Scores on last tokens, the rules for a missing end, advantages by GAE."""
    scores = numbers(4, 4, -2, 2)
    source, ended = "components/rl/README.md, what holds for every algorithm", [True, False, True, False]
    stream = {"rewards": dirty(rows(6), MASK), "values": dirty(rows(7), MASK), "mask": MASK}
    equation = "Schulman et al. 2016, equation 16, as the whole sum over later deltas"
    penalised = "Ziegler et al. 2019, equation 2"
    found = [
        Case("token_rewards/ragged", "the score lies on the last token, whatever the length", penalised,
             {"scores": scores, "penalty": dirty(rows(5), MASK), "mask": MASK}),
        Case("token_rewards/not-finite-padding", "nan and infinity outside the mask do not spread", penalised,
             {"scores": scores, "penalty": dirty(rows(5), MASK, NOT_FINITE), "mask": MASK}),
    ]  # fmt: skip
    found += [
        Case(f"eos_rule/{rule}", "only what was cut off changes", source,
             {"scores": scores, "ended": ended, "rule": rule, "penalty": 1.5})
        for rule in ("penalty", "replace", "none")
    ]  # fmt: skip
    found += [
        Case(f"gae/gamma-{gamma}-lam-{lam}", about, equation, {**stream, "gamma": gamma, "lam": lam})
        for gamma, lam, about in (
            (1.0, 0.95, "the defaults"),
            (0.9, 0.8, "both discounts at work"),
            (1.0, 1.0, "returns are sums of rewards"),
            (0.7, 0.0, "one-step differences"),
        )
    ]
    noisy = {"rewards": dirty(rows(6), MASK, NOT_FINITE), "values": dirty(rows(7), MASK, NOT_FINITE), "mask": MASK}
    return [
        *found,
        Case("gae/not-finite-padding", "nothing leaks across the end", equation, {**noisy, "gamma": 1.0, "lam": 0.95}),
    ]


def group_advantages() -> list[Case]:
    """Advantages within groups of responses to one prompt; neighbours in the batch are a group."""
    spread = [0.5, 2.5, -1.0, 1.0, 10.0, 10.0, 10.0, 10.0, 0.0, 1.0, 0.0, 0.0]
    offset = [round(100.0 * (at // 3) + number, 4) for at, number in enumerate(numbers(8, 9))]
    rloo = "Kool et al. 2019; Ahmadian et al. 2024 (RLOO)"
    grpo = "Shao et al. 2024, section 4.1.2; without a scale Liu et al. 2025 (Dr. GRPO)"
    found = [
        Case("leave_one_out/groups-of-4", "a group without spread teaches nothing", rloo,
             {"rewards": spread, "group_size": 4}),
        Case("leave_one_out/pairs", "with two, each is the other's baseline", rloo,
             {"rewards": spread, "group_size": 2}),
        Case("leave_one_out/prompt-major", "scores tell their prompt: a wrong layout shows at once", rloo,
             {"rewards": offset, "group_size": 3}),
    ]  # fmt: skip
    found += [
        Case(f"group_advantages/{scale}", about, grpo,
             {"rewards": spread, "group_size": 4, "scale": scale, "eps": 1e-4})
        for scale, about in (
            ("group", "deviation over n - 1 of each group; zeros where a group has none"),
            ("batch", "deviation of all rewards"),
            ("none", "centred only"),
        )
    ]  # fmt: skip
    return [
        *found,
        Case("group_advantages/prompt-major", "scores tell their prompt: a wrong layout shows at once", grpo,
             {"rewards": offset, "group_size": 3, "scale": "group", "eps": 1e-4}),
        Case("group_advantages/pairs", "two responses: +-1/sqrt(2) whatever the distance", grpo,
             {"rewards": [3.0, 1.0, 0.25, 0.5, -7.0, -7.0], "group_size": 2, "scale": "group", "eps": 1e-6}),
        *(
            Case(f"rloo_advantages/kl-coef-{kl_coef}", about, rloo,
                 {"scores": numbers(31, 4, -2, 2), "logprobs": dirty(rows(32, -3, 0), MASK),
                  "ref_logprobs": dirty(rows(33, -3, 0), MASK), "mask": MASK, "group_size": 2, "kl_coef": kl_coef})
            for kl_coef, about in ((0.05, "the whole response's KL is taken off its score"), (0.0, "scores alone"))
        ),
    ]  # fmt: skip


def lagrangian() -> list[Case]:
    """PPO-Lag's combined advantage and its multiplier."""
    equation = "Dai et al. 2023 (Safe RLHF), equations 9 to 11, with the whole KL in both streams"
    tokens = ("logprobs", "ref_logprobs", "values", "cost_values")
    streams = {
        "scores": numbers(9, 4, -2, 2), "costs": numbers(10, 4, -2, 2),
        **{name: dirty(rows(34 + at, -2, 0), MASK) for at, name in enumerate(tokens)},
        "mask": MASK, "kl_coef": 0.1, "gamma": 1.0, "lam": 0.95,
    }  # fmt: skip
    steps = {
        "above-limit": (0.0, 0.1, 0.8, 0.0, 5.0, "cost above its limit raises lambda"),
        "below-limit": (0.3, 0.1, -1.2, -0.5, 5.0, "cost below its limit lowers it"),
        "slow-when-small": (-4.0, 0.1, 2.0, 0.0, 5.0, "the step is scaled by lambda itself"),
        "bounded": (1.6, 0.5, 3.0, 0.0, 5.0, "lambda_max holds"),
    }
    return [
        *(
            Case(f"ppo_lag_advantages/{name}", about, equation, {**streams, "log_lambda": value})
            for name, about, value in (
                ("log-lambda-0", "reward and cost weigh the same", 0.0),
                ("log-lambda-minus-3", "the reward's weight and the cost's add up to 1", -3.0),
                ("log-lambda-1.5", "the KL's weight is kl_coef here too", 1.5),
            )
        ),
        *(
            Case(f"log_lambda_step/{variant}", about, equation,
                 {"log_lambda": start, "lr": lr, "cost": cost, "limit": limit, "lambda_max": highest})
            for variant, (start, lr, cost, limit, highest, about) in steps.items()
        ),
    ]  # fmt: skip


def schedules() -> list[Case]:
    """Learning rates as shares of the peak, update by update."""
    return [
        Case(f"learning_rate/{schedule}-warmup-{warmup}-floor-{floor}", about, "components/settings.py, Optimizer",
             {"updates": list(range(20)), "total": 20, "warmup": warmup, "schedule": schedule, "min_lr": floor})
        for schedule, warmup, floor, about in (
            ("cosine", 0.1, 0.1, "rises for two updates, then down to a tenth"),
            ("linear", 0.03, 0.0, "a warm-up of less than an update takes one"),
            ("constant", 0.25, 0.1, "a floor means nothing here"),
            ("linear", 0.0, 0.5, "no warm-up: the first update has the peak"),
        )
    ]  # fmt: skip


def best_of_n() -> list[Case]:
    """The best of n samples of a discrete distribution: closed forms."""
    source = "order statistics; the KL is at most log n - (n - 1) / n (Beirami et al. 2024)"
    distribution = {"probabilities": [0.5, 0.2, 0.2, 0.1], "scores": [0.0, 1.0, 2.0, 5.0]}
    tied = {"probabilities": [0.25, 0.25, 0.5], "scores": [1.0, 1.0, -2.0]}
    return [
        Case(f"best_of_n/{variant}-n-{n}", about, source, {**inputs, "n": n})
        for (variant, about, inputs), n in itertools.product(
            (
                ("distinct", "expected best score, and KL to the distribution", distribution),
                ("tied", "tied outcomes share the mass of their score", tied),
            ),
            (2, 3, 4),
        )
    ]
