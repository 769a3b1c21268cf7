"""The numbers of a comparison: what each is called, and its mean with a 95 % interval over samples.

`eval/` are the policy's by the reward and cost models, `gold/` the policy's by the judge; `eval_baseline/`
and `gold_baseline/` are the baseline's. `..._gain` is the policy's less the baseline's over the same prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from components.artifacts import Metrics
from components.evaluate.samples import QUESTIONS, Answer, Sample, by_category
from components.intervals import Interval, bootstrap

SIMILAR_LENGTH = 0.1
"""Two responses are of similar length when they differ by at most this share of the longer one."""

OfAnswer = Callable[[Answer], float | None]
OfSample = Callable[[Sample], float | None]
Intervals = dict[str, Interval]


@dataclass(frozen=True)
class Measures:
    """Every number of a comparison."""

    overall: Intervals
    """Means over all prompts."""
    categories: dict[str, Intervals]
    """The same over the prompts of each category."""
    points: Metrics
    """Numbers that are no means over prompts, and so have no interval."""

    def interval(self, metric: str) -> Interval | None:
        """The interval of a metric, or of `metric/category`; None where it has none."""
        if metric in self.overall:
            return self.overall[metric]
        name, _, category = _split(metric)
        return self.categories.get(category, {}).get(name)

    def flat(self) -> Metrics:
        """The overall means and the points, without what could not be measured."""
        values = {name: interval.mean for name, interval in self.overall.items()} | self.points
        return {name: value for name, value in values.items() if value == value}


def measure(samples: Sequence[Sample], points: Metrics, *, cost: bool, judge: bool) -> Measures:
    """The numbers of a comparison; `points` come from elsewhere (`POINTS`)."""
    table = measurements(cost=cost, judge=judge)
    groups = by_category(samples)
    return Measures(
        _intervals(samples, table), {name: _intervals(rows, table) for name, rows in groups.items()}, points
    )


def measurements(*, cost: bool, judge: bool) -> dict[str, OfSample]:
    """What is measured on one sample, by the metric's name; None where it does not apply."""
    table: dict[str, OfSample] = {
        "eval/win_rate": lambda sample: sample.outcome,
        "eval/win_rate_similar_length": _outcome_at_similar_length,
        "eval/tie_rate": lambda sample: float(sample.outcome == 0.5),
        "eval/kl_k1": lambda sample: sample.kl_k1,
        "eval/kl_k3": lambda sample: sample.kl_k3,
    }
    for name, of_answer in _answer_measurements(cost).items():
        table |= _compared("eval", name, of_answer)
    for question in QUESTIONS if judge else ():
        table |= _compared("gold", question, _verdict("gold", question))
    return table


POINTS: Mapping[str, str] = {
    "distinct_1": "share of different words among all words",
    "distinct_2": "share of different pairs of neighbouring words among all pairs",
    "perplexity": "on held-out demonstrations",
}
"""What has no interval, of the policy as eval/ and of the baseline as eval_baseline/."""


def point_names() -> list[str]:
    """The names of the metrics without an interval."""
    return [f"{group}/{name}" for group in ("eval", "eval_baseline") for name in POINTS]


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams of all texts; NaN without any (Li et al. 2016)."""
    grams = [
        tuple(words[start : start + n])
        for words in map(str.split, texts)
        for start in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else float("nan")


def _answer_measurements(cost: bool) -> dict[str, OfAnswer]:
    table: dict[str, OfAnswer] = {
        "reward": lambda answer: answer.reward,
        "helpful": _verdict("proxy", "helpful"),
        "length": lambda answer: float(answer.response.num_tokens),
        "missing_eos": lambda answer: float(not answer.response.ended),
    }
    if cost:
        table |= {"cost": lambda answer: answer.cost, "harmful": _verdict("proxy", "harmful")}
    return table


def _compared(group: str, name: str, of_answer: OfAnswer) -> dict[str, OfSample]:
    """A measurement of the policy's answer, of the baseline's, and of the difference where both apply."""

    def gain(sample: Sample) -> float | None:
        policy, baseline = of_answer(sample.policy), of_answer(sample.baseline)
        return None if policy is None or baseline is None else policy - baseline

    return {
        f"{group}/{name}": lambda sample: of_answer(sample.policy),
        f"{group}_baseline/{name}": lambda sample: of_answer(sample.baseline),
        f"{group}/{name}_gain": gain,
    }


def _verdict(source: str, question: str) -> OfAnswer:
    def value(answer: Answer) -> float | None:
        verdict = (answer.gold if source == "gold" else answer.proxy).get(question)
        return None if verdict is None else float(verdict)

    return value


def _outcome_at_similar_length(sample: Sample) -> float | None:
    policy, baseline = sample.policy.response.num_tokens, sample.baseline.response.num_tokens
    similar = abs(policy - baseline) <= SIMILAR_LENGTH * max(policy, baseline)
    return sample.outcome if similar else None


def _intervals(samples: Sequence[Sample], table: Mapping[str, OfSample]) -> Intervals:
    result = {}
    for name, of_sample in table.items():
        values = [value for sample in samples if (value := of_sample(sample)) is not None]
        result[name] = bootstrap(values)
    return result


def _split(metric: str) -> tuple[str, str, str]:
    """`group/name/category` as (group/name, /, category); a category may hold slashes itself."""
    group, _, rest = metric.partition("/")
    name, separator, category = rest.partition("/")
    return f"{group}/{name}", separator, category
