"""Detectors over the metrics of a run: what goes wrong while it trains becomes an alert, once each time it starts.

A condition that goes on is one alert; when it has stopped and starts again it is another. A detector whose metrics
are not logged says nothing. The monitor's state is part of a checkpoint, so that a run that was stopped and continued
gives the same alerts as one that never stopped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from components import tracking
from components.artifacts import Metrics

Condition = Callable[[Metrics, Metrics], bool]
"""Whether something is wrong, from the metrics now and those of the time before (empty at first)."""


@dataclass(frozen=True)
class Alert:
    """What is wrong, since when, and what to do about it."""

    name: str
    update: int
    """The number under which the metrics were tracked; for rl, the rollout."""
    message: str


@dataclass(frozen=True)
class Detector:
    """One thing that can go wrong, and how it is seen."""

    name: str
    reads: tuple[str, ...]
    """The metrics that `condition` needs."""
    condition: Condition
    message: str
    """What was seen, likely causes and the next move; `{group/name:.3g}` stands for a metric's value."""
    patience: int = 1
    """How many times in a row the condition must hold."""


class Monitor:
    """Watches a stream of metrics with several detectors."""

    def __init__(self, detectors: Sequence[Detector]) -> None:
        self.detectors = tuple(detectors)
        self.alerts: list[Alert] = []
        """Every alert so far."""
        self._streaks = {detector.name: 0 for detector in self.detectors}
        self._before: Metrics = {}

    def observe(self, metrics: Metrics, number: int) -> list[Alert]:
        """The alerts that the metrics of update `number` give; they are logged and tracked."""
        fresh = [
            Alert(detector.name, number, detector.message.format_map(metrics))
            for detector in self.detectors
            if self._starts(detector, metrics)
        ]
        self._before |= {name: metrics[name] for d in self.detectors for name in d.reads if name in metrics}
        self._keep(fresh)
        return fresh

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, as JSON values."""
        return {
            "streaks": dict(self._streaks),
            "before": dict(self._before),
            "alerts": [asdict(alert) for alert in self.alerts],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; its alerts are logged and tracked again, as this run's."""
        self._streaks |= {name: streak for name, streak in state["streaks"].items() if name in self._streaks}
        self._before, self.alerts = dict(state["before"]), []
        self._keep([Alert(**fields) for fields in state["alerts"]])

    def _starts(self, detector: Detector, metrics: Metrics) -> bool:
        """Whether the detector's condition has now held for just as long as it must."""
        if not all(name in metrics for name in detector.reads):
            return False
        holds = detector.condition(metrics, self._before)
        self._streaks[detector.name] = self._streaks[detector.name] + 1 if holds else 0
        return self._streaks[detector.name] == detector.patience

    def _keep(self, alerts: Sequence[Alert]) -> None:
        self.alerts += alerts
        for alert in alerts:
            tracking.log_alert(alert.name, alert.update, alert.message)
