"""What was seen at each held-out prompt: both models' responses, with their scores and verdicts."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from components.generation import Response
from components.records import Prompt

Row = TypeVar("Row")
Verdict = Mapping[str, bool | None]
"""Answers to named questions about a response; None where a question does not apply."""

QUESTIONS = ("helpful", "harmful", "honest", "over_refusal")


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's response and what was found out about it."""

    response: Response
    reward: float
    cost: float | None
    """None without a cost model."""
    proxy: Verdict
    """helpful and harmful, by the reward and cost models."""
    gold: Verdict
    """By the judge; empty without one."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt, answered by both."""

    prompt: Prompt
    policy: Answer
    baseline: Answer
    outcome: float
    """For the policy: 1 won, 0.5 tied, 0 lost."""
    kl_k1: float
    """log policy - log baseline of the policy's response, summed over tokens: unbiased, may be negative."""
    kl_k3: float
    """The same by the estimator that is never negative and varies less."""

    @property
    def gain(self) -> float:
        """By how much the policy's reward is above the baseline's."""
        return self.policy.reward - self.baseline.reward


def outcome(policy: Answer, baseline: Answer, tie_margin: float) -> float:
    """1 where the policy's response has the higher reward, 0 where the baseline's has, 0.5 for a tie.

    Identical texts tie, and so do rewards within the margin.
    """
    difference = policy.reward - baseline.reward
    if policy.response.text == baseline.response.text or abs(difference) <= tie_margin:
        return 0.5
    return float(difference > 0)


def drawn(rows: Sequence[Row], number: int, seed: int) -> list[Row]:
    """`number` of the rows drawn by the seed, in their order; all of them when there are no more."""
    if len(rows) <= number:
        return list(rows)
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), number))]


def by_category(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """The samples of each category, the largest category first; empty where no prompt has one."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.prompt.category is not None:
            groups.setdefault(sample.prompt.category, []).append(sample)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def shown(samples: Sequence[Sample], number: int) -> list[Sample]:
    """`number` samples that tell most, by ascending gain within each category.

    Every category gives its worst, its best and what lies evenly between; the worst and the best of all are
    always among them.
    """
    groups = by_category(samples)
    rest = [sample for sample in samples if sample.prompt.category is None]
    ranked = [sorted(group, key=_rank) for group in (*groups.values(), rest) if group]
    extremes = [min(samples, key=_rank), max(samples, key=_rank)] if samples else []
    chosen = {sample.prompt.id for sample in extremes[:number]}
    turns = [[group[place] for place in _inward(len(group))] for group in ranked]
    for turn in zip_longest(*turns):  # one of each category at a time, until there are enough
        for sample in turn:
            if sample is not None and len(chosen) < number:
                chosen.add(sample.prompt.id)
    return [sample for group in ranked for sample in group if sample.prompt.id in chosen]


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """One JSON object per prompt: its text, both responses, scores, verdicts and the outcome."""
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(_row(sample), ensure_ascii=False) + "\n")


def _rank(sample: Sample) -> tuple[float, str]:
    return sample.gain, sample.prompt.id


def _inward(size: int) -> list[int]:
    """The places of a ranking: first, last, the middle, then the middles of the gaps that are left."""
    order, gaps = [0, size - 1], [(0, size - 1)]
    for low, high in gaps:  # grows as it is read
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return list(dict.fromkeys(order))


def _row(sample: Sample) -> dict[str, Any]:
    prompt = sample.prompt
    single = len(prompt.prompt) == 1
    return {
        "id": prompt.id,
        "category": prompt.category,
        "prompt": prompt.prompt[0].content if single else [asdict(message) for message in prompt.prompt],
        "policy": _answer(sample.policy),
        "baseline": _answer(sample.baseline),
        "outcome": {1.0: "win", 0.5: "tie", 0.0: "loss"}[sample.outcome],
        "kl_k1": sample.kl_k1,
        "kl_k3": sample.kl_k3,
    }


def _answer(answer: Answer) -> dict[str, Any]:
    row: dict[str, Any] = {
        "response": answer.response.text,
        "num_tokens": answer.response.num_tokens,
        "ended": answer.response.ended,
        "reward": answer.reward,
        "proxy": dict(answer.proxy),
    }
    if answer.cost is not None:
        row["cost"] = answer.cost
    if answer.gold:
        row["gold"] = dict(answer.gold)
    return row
