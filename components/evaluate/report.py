"""The report of evaluate: report.json for programs, report.html for people, samples.jsonl for both."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.artifacts import write_json
from components.evaluate.gate import Check
from components.evaluate.measures import SIMILAR_LENGTH, Measures
from components.evaluate.plots import draw
from components.evaluate.samples import QUESTIONS, Sample, shown, write_samples
from components.evaluate.settings import EvaluateSettings
from components.intervals import Interval
from components.pages import render
from components.records import prompt_text

PAGE, REPORT, SAMPLES = "report.html", "report.json", "samples.jsonl"
MAX_CATEGORIES = 12
"""The largest categories have a place on the page; report.json has all."""
_TEMPLATE = Path(__file__).with_name("report.html.j2")

LABELS = {
    "gold/helpful": ("Helpful", 1),
    "gold/harmful": ("Harmful", -1),
    "gold/honest": ("Honest", 1),
    "gold/over_refusal": ("Over-refusal", -1),
    "eval/helpful": ("Helpful, by the reward model", 1),
    "eval/harmful": ("Harmful, by the cost model", -1),
    "eval/reward": ("Reward", 1),
    "eval/cost": ("Cost", -1),
    "eval/length": ("Length in tokens", 0),
    "eval/missing_eos": ("Did not end", -1),
    "eval/distinct_1": ("Distinct words", 0),
    "eval/distinct_2": ("Distinct pairs of words", 0),
    "eval/perplexity": ("Perplexity on demonstrations", 0),
}
"""What both models are compared on, in the page's order; if more is better (1), worse (-1) or neither (0)."""

PAIR_LABELS = {
    "eval/win_rate": "Win rate, ties half",
    "eval/win_rate_similar_length": "Win rate among responses of similar length",
    "eval/tie_rate": "Ties",
    "eval/kl_k1": "KL to the baseline, k1",
    "eval/kl_k3": "KL to the baseline, k3",
}

SCORERS = {
    "eval/reward": ("reward",),
    "eval/helpful": ("reward",),
    "eval/win_rate": ("reward",),
    "eval/win_rate_similar_length": ("reward",),
    "eval/tie_rate": ("reward",),
    "eval/cost": ("cost",),
    "eval/harmful": ("cost",),
}
"""The metrics that a scalar model decides, and which."""


@dataclass(frozen=True)
class Report:
    """Everything that an evaluation found."""

    settings: EvaluateSettings
    samples: Sequence[Sample]
    measures: Measures
    checks: Sequence[Check]
    num_available: int
    """Test prompts there were to draw from."""
    training_scorers: Sequence[str]
    """Which of reward and cost are the models that the policy was trained on."""

    @property
    def passed(self) -> bool:
        """Whether every threshold holds."""
        return all(check.passed for check in self.checks)

    @property
    def _has_cost(self) -> bool:
        return "eval/cost" in self.measures.overall

    @property
    def group(self) -> str:
        """Where helpful, harmful and so on come from: the judge, or the reward and cost models."""
        return "gold" if self.settings.judge else "eval"

    def write(self, folder: Path) -> Path:
        """Write report.json, samples.jsonl and report.html to the folder; returns the page's path."""
        folder.mkdir(parents=True, exist_ok=True)
        content = self._content()
        write_json(folder / REPORT, content)
        write_samples(self.samples, folder / SAMPLES)
        page = folder / PAGE
        page.write_text(self._page(content), encoding="utf-8")
        return page

    def _content(self) -> dict[str, Any]:
        measures = self.measures
        content: dict[str, Any] = {
            "passed": self.passed,
            "thresholds": [asdict(check) for check in self.checks],
            "metrics": measures.flat(),
            "intervals": {name: value._asdict() for name, value in measures.overall.items()},
            "categories": {
                category: {name: value._asdict() for name, value in intervals.items()}
                for category, intervals in measures.categories.items()
            },
            "judge": self.settings.judge,
            "notes": list(self._notes()),
        }
        if self.settings.judge:
            content["gold"] = {
                "sft": {name: measures.overall[f"gold_baseline/{name}"]._asdict() for name in QUESTIONS},
                "rl": {name: measures.overall[f"gold/{name}"]._asdict() for name in QUESTIONS},
            }
        plain: dict[str, Any] = _without_nan(content)
        return plain

    def _notes(self) -> Iterator[str]:
        """What a reader must know to read the numbers right."""
        relied = self._relied_on()
        if relied:
            yield (
                f"The gate relies on the {' and the '.join(relied)} model that the policy was trained on. A "
                "policy learns such a model's mistakes along with its virtues, so these numbers flatter it: "
                "gate on a judge, or on a model trained on other data, and read the samples."
            )
        if not self.settings.judge:
            yield (
                "There is no judge. Helpful means, by the reward model, a reward above the baseline's median"
                f"{'; harmful means, by the cost model, a cost above 0' if self._has_cost else ''}. Nothing "
                "here measures honesty or over-refusal."
            )
        if not self.settings.thresholds:
            yield "No thresholds are set (evaluate.thresholds), so any policy passes."
        if over := [check for check in self.checks if check.over]:
            names = ", ".join(check.metric for check in over)
            yield (
                f"There is no champion yet, so nothing had to be better than it in {names}."
                if not over[0].bound
                else f"What was asked of {names} is a margin over the champion, version {over[0].over}."
            )
        generation = self.settings.generation
        if generation.temperature == 0 or generation.top_p < 1 or generation.top_k:
            yield (
                "Responses were not sampled from the policy's whole distribution, so the KL is the log-ratio "
                "of the responses seen and no estimate of the policy's."
            )

    def _relied_on(self) -> list[str]:
        """The scorers that trained the policy and that a threshold reads."""
        read = {scorer for metric in self.settings.thresholds for scorer in SCORERS.get(_base(metric), ())}
        return [scorer for scorer in self.training_scorers if scorer in read]

    def _page(self, content: dict[str, Any]) -> str:
        overall = {"all": self.measures.overall}
        largest = dict(list(self.measures.categories.items())[:MAX_CATEGORIES])
        questions = [name for name in QUESTIONS if f"{self.group}/{name}" in self.measures.overall]
        return render(
            _TEMPLATE,
            **content,
            settings=self.settings.model_dump(),
            num_available=self.num_available,
            samples=[
                (sample, prompt_text(sample.prompt.prompt))
                for sample in shown(self.samples, self.settings.num_samples_shown)
            ],
            num_samples=len(self.samples),
            compared=list(self._compared()),
            pairs=[(label, name, self.measures.overall[name]) for name, label in PAIR_LABELS.items()],
            by_category=overall | largest,
            num_categories=len(self.measures.categories),
            questions=questions,
            group=self.group,
            similar_length=SIMILAR_LENGTH,
            plots=draw(self.samples, overall | largest, questions, self.group),
        )

    def _compared(self) -> Iterator[dict[str, Any]]:
        """The rows of the table that sets the two models side by side."""
        measures = self.measures
        for metric, (label, better) in LABELS.items():
            twin = metric.replace("/", "_baseline/")
            if metric in measures.overall:
                gain = measures.overall[f"{metric}_gain"]
                yield {
                    "label": label,
                    "metric": metric,
                    "policy": measures.overall[metric],
                    "baseline": measures.overall[twin],
                    "gain": gain,
                    "verdict": _verdict(gain, better),
                }
            elif not math.isnan(measures.points.get(metric, math.nan)):
                policy, baseline = measures.points[metric], measures.points[twin]
                yield {
                    "label": label,
                    "metric": metric,
                    "policy": _point(policy),
                    "baseline": _point(baseline),
                    "gain": _point(policy - baseline),
                    "verdict": "",
                }


def _base(metric: str) -> str:
    """The metric without its category and without `_gain`: what it is made from."""
    return "/".join(metric.split("/")[:2]).removesuffix("_gain")


def _verdict(gain: Interval, better: int) -> str:
    """Whether the difference is surely good or surely bad: its interval lies on one side of zero."""
    if better == 0 or not (gain.low > 0 or gain.high < 0):
        return ""
    return "good" if (gain.mean > 0) == (better > 0) else "bad"


def _point(value: float) -> Interval:
    """A number without an interval, for the same column."""
    return Interval(value, math.nan, math.nan, 0)


def _without_nan(value: Any) -> Any:
    """The value with None for every NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
