"""The numbers of a comparison, worked out by hand."""

import math

import pytest
import torch

from components.evaluate.contestants import divergence
from components.evaluate.measures import Measures, distinct, measure, measurements
from components.evaluate.samples import Answer, Sample, Verdict, drawn, outcome, shown
from components.generation import Response
from components.records import Message, Prompt


def answer(reward: float, text: str = "", num_tokens: int = 10, gold: Verdict | None = None) -> Answer:
    return Answer(
        Response(text or str(reward), tuple(range(num_tokens)), True), reward, None, {"helpful": reward > 0}, gold or {}
    )


def sample(
    name: str, policy: Answer, baseline: Answer, category: str | None = None, margin: float = 0.0
) -> Sample:
    prompt = Prompt(name, (Message("user", name),), "here", category)
    return Sample(prompt, policy, baseline, outcome(policy, baseline, margin), 0.5, 0.25)


def measured(samples: list[Sample], judge: bool = False) -> Measures:
    return measure(samples, {}, cost=False, judge=judge)


def test_a_higher_reward_wins_and_a_lower_one_loses() -> None:
    assert outcome(answer(1.0), answer(0.0), 0.0) == 1.0
    assert outcome(answer(0.0), answer(1.0), 0.0) == 0.0


def test_equal_texts_and_rewards_within_the_margin_tie() -> None:
    assert outcome(answer(1.0, "same"), answer(0.0, "same"), 0.0) == 0.5
    assert outcome(answer(1.0), answer(0.75), 0.25) == 0.5
    assert outcome(answer(1.0), answer(0.75), 0.2) == 1.0


def test_ties_count_half_in_the_win_rate() -> None:
    won, lost = sample("a", answer(1), answer(0)), sample("b", answer(0), answer(1))
    tied = [sample(str(n), answer(0), answer(0)) for n in range(2)]
    measures = measured([won, won, won, lost, *tied])
    assert measures.overall["eval/win_rate"].mean == pytest.approx((3 + 0.5 * 2) / 6)
    assert measures.overall["eval/tie_rate"].mean == pytest.approx(2 / 6)


def test_win_rate_at_similar_length_leaves_out_pairs_more_than_a_tenth_apart() -> None:
    longer = sample("a", answer(1, num_tokens=20), answer(0, num_tokens=10))
    alike = sample("b", answer(0, num_tokens=10), answer(1, num_tokens=9))
    interval = measured([longer, alike]).overall["eval/win_rate_similar_length"]
    assert (interval.mean, interval.n) == (0.0, 1)


def test_categories_are_measured_apart_and_their_names_may_hold_slashes() -> None:
    samples = [
        sample("a", answer(1), answer(0), "crime/theft"), sample("b", answer(0), answer(1), "fact"),
        sample("c", answer(0), answer(1)),
    ]  # fmt: skip
    measures = measured(samples)
    assert set(measures.categories) == {"crime/theft", "fact"}
    found = [measures.interval(f"eval/win_rate{place}") for place in ("/crime/theft", "/fact", "")]
    assert [interval.mean for interval in found if interval] == [1.0, 0.0, pytest.approx(1 / 3)]
    assert measures.interval("eval/win_rate/none") is None


def test_a_gain_is_over_the_prompts_where_both_have_a_verdict() -> None:
    yes, no, absent = ({"helpful": value} for value in (True, False, None))
    samples = [
        sample("a", answer(0, gold=yes), answer(1, gold=no)),
        sample("b", answer(0, gold=yes), answer(1, gold=yes)),
        sample("c", answer(0, gold=yes), answer(1, gold=absent)),
    ]
    overall = measured(samples, judge=True).overall
    assert overall["gold/helpful"].mean == 1.0 and overall["gold/helpful"].n == 3
    assert overall["gold_baseline/helpful"].mean == 0.5
    assert overall["gold/helpful_gain"].mean == 0.5 and overall["gold/helpful_gain"].n == 2
    assert overall["gold/honest"].n == 0


def test_what_applies_nowhere_is_left_out_of_the_flat_metrics() -> None:
    measures = measured([sample("a", answer(1), answer(0))], judge=True)
    assert "gold/honest" in measures.overall and "gold/honest" not in measures.flat()
    assert measures.flat()["eval/reward_gain"] == 1.0


def test_the_names_known_beforehand_are_those_measured() -> None:
    overall = measured([sample("a", answer(1), answer(0))], judge=True).overall
    assert list(overall) == list(measurements(cost=False, judge=True))
    assert "eval/harmful" not in overall
    assert {"eval/harmful", "eval_baseline/cost"} <= set(measurements(cost=True, judge=False))


def test_distinct_counts_different_grams_of_all_texts_together() -> None:
    texts = ["a b a", "a b"]  # words a b a a b; pairs ab, ba, ab
    assert distinct(texts, 1) == 2 / 5
    assert distinct(texts, 2) == 2 / 3
    assert math.isnan(distinct(["a"], 2))


def test_divergence_sums_both_estimates_over_a_response() -> None:
    policy, baseline = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.5])
    k1, k3 = divergence(policy, baseline)  # d = -1, 0.5
    assert k1 == pytest.approx(1 - 0.5)
    assert k3 == pytest.approx((math.exp(-1) + 1 - 1) + (math.exp(0.5) - 0.5 - 1))
    assert divergence(policy, policy) == (0.0, 0.0)
    assert divergence(torch.zeros(0), torch.zeros(0)) == (0.0, 0.0)


def test_fewer_rows_are_drawn_by_the_seed_and_keep_their_order() -> None:
    rows = list(range(100))
    first = drawn(rows, 10, 3)
    assert first == drawn(rows, 10, 3) == sorted(first) and len(set(first)) == 10
    assert first != drawn(rows, 10, 4)
    assert drawn(rows, 100, 3) == drawn(rows, 500, 3) == rows


def test_the_samples_shown_hold_every_category_the_worst_and_the_best() -> None:
    samples = [
        sample(f"{category}{n}", answer(n * scale), answer(0), category)
        for category, scale in (("fact", 1.0), ("sum", 0.1), ("rare", 0.01))
        for n in range(-10, 11)
    ]
    chosen = [row.prompt.id for row in shown(samples, 7)]
    assert len(chosen) == 7
    assert {"fact-10", "fact10", "sum-10", "sum10", "rare-10", "rare10"} <= set(chosen)
    assert chosen == [row.prompt.id for row in shown(samples[::-1], 7)]
    assert len(shown(samples, 1000)) == len(samples)
    assert shown(samples, 0) == [] == shown([], 5)
