"""Each detector fires on what it is for, once each time it starts, and after a restart as if there had been none."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from components import tracking
from components.artifacts import Metrics
from components.monitoring import Alert, Detector, Monitor
from components.rl.alerts import KL_NOISE, rl_monitor
from components.rl.algorithm_settings import AlgorithmSettings, DPOSettings, PPOLagSettings, RLOOSettings
from components.rl.settings import AlertSettings

PATIENCE = 3
SETTINGS = AlertSettings(patience=PATIENCE)
HEALTHY: Metrics = {
    "policy/first_ratio_gap": 2e-6,
    "sampler/logprob_gap": 0.01,
    "sampler/logprob_gap_max": 0.3,
    "loss/skipped_updates": 0.0,
    "rollout/kl_k1": 1.9,
    "rollout/kl_k3": 2.0,
    "rollout/missing_eos": 0.1,
    "rollout/score": 0.9,
    "rollout/score_std": 0.6,
    "policy/entropy": 0.1,
    "cost/lambda": 1.0,
    "cost/window_mean": -0.2,
    "cost/window_low": -0.4,
    "cost/window_high": 0.0,
    "cost/limit": 0.0,
}
VIOLATED = {"cost/window_mean": 0.5, "cost/window_low": 0.2}

PLANTED: dict[str, tuple[Metrics, int]] = {
    "ratio_mismatch": ({"policy/first_ratio_gap": 0.02}, 1),
    "sampler_mismatch": ({"sampler/logprob_gap": 0.11}, 1),
    "skipped_updates": ({"loss/skipped_updates": 1.0}, 1),
    "negative_kl": ({"rollout/kl_k1": -0.2}, PATIENCE),
    "kl_runaway": ({"rollout/kl_k3": 30.0}, PATIENCE),
    "missing_eos": ({"rollout/missing_eos": 0.75}, PATIENCE),
    "entropy_collapse": ({"policy/entropy": 0.001}, PATIENCE),
    "clamped_scores": ({"rollout/score": -9.8}, PATIENCE),
    "lambda_saturated": ({"cost/lambda": 4.99, "cost/window_mean": 0.1}, PATIENCE),
    "lambda_dead": ({"cost/lambda": 0.003}, PATIENCE),
    "constraint_violated": (VIOLATED, PATIENCE),
}
"""What makes each detector fire, and after how many rollouts."""


def monitor(dtype: str = "fp32") -> Monitor:
    return rl_monitor(SETTINGS, dtype, PPOLagSettings(lambda_max=5.0, score_clip=10.0))


def fired(watcher: Monitor, rows: Sequence[Metrics], start: int = 1) -> list[tuple[str, int]]:
    """The name and the number of every alert that the rows give."""
    return [
        (alert.name, alert.update) for number, row in enumerate(rows, start) for alert in watcher.observe(row, number)
    ]


def test_there_is_a_planted_condition_for_every_detector() -> None:
    assert {detector.name for detector in monitor().detectors} == set(PLANTED)


def test_a_healthy_run_gives_no_alert() -> None:
    noisy = [HEALTHY | {"rollout/kl_k1": KL_NOISE * math.sin(n), "cost/window_low": -0.01} for n in range(50)]
    assert fired(monitor(), noisy) == []


@pytest.mark.parametrize("name", PLANTED)
def test_a_detector_fires_once_when_its_condition_has_held_long_enough(name: str) -> None:
    changed, patience = PLANTED[name]
    rows = [HEALTHY] * 4 + [HEALTHY | changed] * 10
    assert fired(monitor(), rows) == [(name, 4 + patience)]


@pytest.mark.parametrize("name", [name for name, (_, patience) in PLANTED.items() if patience > 1])
def test_a_condition_that_does_not_last_is_no_alert(name: str) -> None:
    changed, patience = PLANTED[name]
    rows = ([HEALTHY | changed] * (patience - 1) + [HEALTHY]) * 5
    assert fired(monitor(), rows) == []


@pytest.mark.parametrize("name", PLANTED)
def test_a_condition_that_stopped_and_starts_again_is_another_alert(name: str) -> None:
    changed, patience = PLANTED[name]
    later = changed if name != "skipped_updates" else {"loss/skipped_updates": 2.0}  # a count that only rises
    between = HEALTHY if name != "skipped_updates" else HEALTHY | changed
    rows = [HEALTHY | changed] * patience + [between] + [HEALTHY | later] * patience
    first, second = fired(monitor(), rows)
    assert first == (name, patience) and second == (name, 2 * patience + 1 if patience > 1 else 3)


def test_a_detector_whose_metrics_are_absent_is_silent() -> None:
    everything_wrong = {name: value for changed, _ in PLANTED.values() for name, value in changed.items()}
    assert len(fired(monitor(), [HEALTHY | everything_wrong] * 5)) > 5
    offline = {"loss/skipped_updates": 0.0, "policy/first_ratio_gap": 0.0, "loss/policy": 0.69}
    assert fired(monitor(), [offline] * 10) == []


def test_rollouts_without_the_metric_neither_end_nor_lengthen_a_condition() -> None:
    wrong, silent = HEALTHY | {"rollout/kl_k3": 30.0}, {"loss/policy": 0.0}
    assert fired(monitor(), [wrong, silent, wrong, silent, wrong, silent]) == [("kl_runaway", 5)]


def test_what_is_rounding_in_bf16_is_a_mismatch_in_fp32() -> None:
    row = HEALTHY | {"policy/first_ratio_gap": 0.05}
    assert fired(monitor("bf16"), [row]) == []
    assert fired(monitor("fp32"), [row]) == [("ratio_mismatch", 1)]


@pytest.mark.parametrize("name", ["policy/first_ratio_gap", "rollout/kl_k3"])
def test_a_number_that_is_none_is_not_taken_for_a_good_one(name: str) -> None:
    assert len(fired(monitor(), [HEALTHY | {name: math.nan}] * PATIENCE)) == 1


def test_a_lambda_at_its_bound_is_no_trouble_when_the_limit_is_met() -> None:
    assert fired(monitor(), [HEALTHY | {"cost/lambda": 5.0}] * 10) == []


def test_a_mean_above_the_limit_is_no_violation_while_its_band_reaches_below() -> None:
    assert fired(monitor(), [HEALTHY | {"cost/window_mean": 0.3, "cost/window_low": -0.1}] * 10) == []


def test_without_a_multiplier_or_a_clamp_neither_is_watched() -> None:
    def absent(algorithm: AlgorithmSettings) -> set[str]:
        return set(PLANTED) - {detector.name for detector in rl_monitor(SETTINGS, "bf16", algorithm).detectors}

    multiplier = {"lambda_saturated", "lambda_dead", "constraint_violated"}
    assert absent(PPOLagSettings(multiplier="log")) == set()
    assert absent(PPOLagSettings(multiplier="pid")) == {"lambda_dead"}
    assert absent(RLOOSettings()) == multiplier
    assert absent(DPOSettings()) == multiplier | {"clamped_scores"}


def test_thresholds_are_the_settings() -> None:
    settings = AlertSettings(patience=1, max_kl=1.0, max_missing_eos=0.05, min_entropy=0.2)
    names = [name for name, _ in fired(rl_monitor(settings, "fp32", DPOSettings()), [HEALTHY])]
    assert names == ["kl_runaway", "missing_eos", "entropy_collapse"]


def test_a_message_holds_the_numbers_the_causes_and_the_next_move() -> None:
    watcher = rl_monitor(AlertSettings(patience=1), "fp32", PPOLagSettings(lambda_max=5.0))
    (alert,) = watcher.observe(HEALTHY | {"policy/first_ratio_gap": 0.0213}, 7)
    assert (alert.name, alert.update) == ("ratio_mismatch", 7)
    for part in ("0.0213", "0.001", "dropout", "position ids", "adapters", "temperatures", "Stop the run"):
        assert part in alert.message
    saturated, violated = watcher.observe(HEALTHY | VIOLATED | {"cost/lambda": 5.0}, 8)
    assert "lambda_max 5" in saturated.message and "above the limit 0" in saturated.message
    assert "J_C 0.5" in violated.message and "from 0.2" in violated.message


def stream() -> list[Metrics]:
    """Thirty rollouts in which much goes wrong, stops and starts again."""
    rows = []
    for number in range(30):
        row = dict(HEALTHY)
        for place, (name, (changed, _)) in enumerate(PLANTED.items()):
            if name != "skipped_updates" and (number + place) % 9 < 4:
                row |= changed
        rows.append(row | {"loss/skipped_updates": float(number // 4)})
    return rows


@pytest.mark.parametrize("stop", range(30))
def test_a_run_that_was_stopped_and_continued_gives_the_alerts_of_one_that_was_not(stop: int) -> None:
    whole = monitor()
    fired(whole, stream())
    assert len(whole.alerts) > 20
    before, after = monitor(), monitor()
    fired(before, stream()[:stop])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    fired(after, stream()[stop:], start=stop + 1)
    assert after.alerts == whole.alerts
    assert after.state_dict() == whole.state_dict()


def test_the_state_of_an_older_monitor_is_taken_as_far_as_it_goes() -> None:
    def named(name: str) -> Detector:
        return Detector(name, ("x",), lambda now, _: now["x"] > 0, "x is {x}", patience=2)

    before, after = Monitor([named("gone"), named("kept")]), Monitor([named("kept"), named("fresh")])
    before.observe({"x": 1.0}, 1)
    after.load_state_dict(before.state_dict())
    assert after.observe({"x": 1.0}, 2) == [Alert("kept", 2, "x is 1.0")]
    assert after.observe({"x": 1.0}, 3) == [Alert("fresh", 3, "x is 1.0")]


def test_an_alert_is_a_warning_and_a_line_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "alerts.jsonl").write_text("of a run before\n")
    with caplog.at_level(logging.WARNING), tracking.track("rl", {}, tmp_path):
        watcher = monitor()
        fired(watcher, [HEALTHY, HEALTHY | {"policy/first_ratio_gap": 0.5}])
    (line,) = (tmp_path / "alerts.jsonl").read_text().splitlines()
    (alert,) = watcher.alerts
    assert json.loads(line) == {"name": "ratio_mismatch", "update": 2, "message": alert.message}
    assert [record.getMessage() for record in caplog.records] == [f"alert ratio_mismatch at 2: {alert.message}"]

    # a continued run has a folder of its own, and the alerts from before it was stopped are in it too
    with tracking.track("rl", {}, tmp_path / "continued"):
        monitor().load_state_dict(watcher.state_dict())
    assert (tmp_path / "continued" / "alerts.jsonl").read_text().splitlines() == [line]


def test_only_the_first_process_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "1")
    with tracking.track("rl", {}, tmp_path):
        watcher = monitor()
        fired(watcher, [HEALTHY | {"policy/first_ratio_gap": 0.5}])
        assert tracking.folder() is None
    assert len(watcher.alerts) == 1
    assert not caplog.records and not (tmp_path / "alerts.jsonl").exists()


def test_responses_that_are_meant_to_be_stale_are_an_alert_only_where_they_stay_too_far_away() -> None:
    watcher = rl_monitor(SETTINGS, "fp32", PPOLagSettings(lambda_max=5.0), staleness=2)
    assert set(PLANTED) - {d.name for d in watcher.detectors} == {"sampler_mismatch", "negative_kl"}
    wrong = HEALTHY | {"sampler/logprob_gap": 0.2, "rollout/kl_k1": -0.2}
    assert fired(watcher, [wrong] * (PATIENCE - 1) + [HEALTHY]) == []
    assert fired(watcher, [wrong] * (PATIENCE + 1), start=4) == [("too_stale", 3 + PATIENCE)]
    assert "0.2 nats" in watcher.alerts[0].message and "too far in 2 batches" in watcher.alerts[0].message
