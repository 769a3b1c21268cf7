"""The gate's thresholds and the judge's answers: what passes, and what is refused with which words."""

import math
import sys
from types import ModuleType
from typing import Any

import pytest

from components.champion import Champion
from components.errors import InputError
from components.evaluate.gate import check_champion, check_names, checks
from components.evaluate.judges import Judge
from components.evaluate.measures import Measures
from components.evaluate.settings import Bound, EvaluateSettings
from components.intervals import Interval
from components.parsing import parse

MEASURES = Measures(
    {
        "eval/win_rate": Interval(0.6, 0.55, 0.65, 100),
        "gold/honest": Interval(math.nan, math.nan, math.nan, 0),
    },
    {"fact": {"eval/win_rate": Interval(0.4, 0.3, 0.5, 50)}},
    {"eval/distinct_1": 0.2},
)


def passes(metric: str, **bound: Any) -> bool:
    (check,) = checks({metric: Bound(**bound)}, MEASURES)
    return check.passed


def test_a_bound_is_met_from_its_own_value_on() -> None:
    assert passes("eval/win_rate", min=0.6) and passes("eval/win_rate", max=0.6)
    assert not passes("eval/win_rate", min=0.61) and not passes("eval/win_rate", max=0.59)
    assert passes("eval/win_rate", min=0.5, max=0.7)


def test_an_end_of_the_interval_can_be_what_counts() -> None:
    assert passes("eval/win_rate", min=0.55, at="low") and not passes("eval/win_rate", min=0.56, at="low")
    assert not passes("eval/win_rate", max=0.64, at="high")


def test_a_category_and_a_number_without_interval_can_be_bounded() -> None:
    assert passes("eval/win_rate/fact", max=0.4) and not passes("eval/win_rate/fact", min=0.5)
    assert passes("eval/distinct_1", min=0.1)


@pytest.mark.parametrize("bound", [{"min": -1e9}, {"max": 1e9}])
def test_what_could_not_be_measured_never_passes(bound: dict[str, float]) -> None:
    assert not passes("gold/honest", **bound)


CHAMPION = Champion("abc123", {"eval/win_rate": 0.58, "eval/win_rate/fact": 0.45, "gold/honest": 0.5})


def test_a_bound_over_the_champion_is_a_margin_to_its_number() -> None:
    def beats(metric: str, **bound: Any) -> bool:
        (check,) = checks({metric: Bound(over="champion", **bound)}, MEASURES, CHAMPION)
        assert check.over == "abc123"
        return check.passed

    assert beats("eval/win_rate", min=0.01) and not beats("eval/win_rate", min=0.03)  # 0.6 against 0.58
    assert beats("eval/win_rate", max=0.02) and not beats("eval/win_rate", max=0.01)
    assert not beats("eval/win_rate", min=0.0, at="low")  # 0.55: not sure enough
    assert not beats("eval/win_rate/fact", min=0.0) and beats("eval/win_rate/fact", min=-0.05)  # 0.4 against 0.45
    assert not beats("gold/honest", min=-1e9)  # it could not be measured
    (check,) = checks({"eval/win_rate": Bound(min=0.01, max=0.1, over="champion")}, MEASURES, CHAMPION)
    assert check.bound == pytest.approx({"min": 0.59, "max": 0.68})


def test_without_a_champion_there_is_nothing_to_beat_but_other_bounds_hold() -> None:
    thresholds = {"eval/win_rate": Bound(min=0.3, over="champion"), "eval/distinct_1": Bound(min=0.5)}
    over, own = checks(thresholds, MEASURES, None)
    assert over.passed and over.over == "champion" and not own.passed
    assert not checks({"gold/honest": Bound(min=0, over="champion")}, MEASURES, None)[0].passed


def test_a_champion_that_was_evaluated_without_the_metric_is_told() -> None:
    thresholds = {"eval/distinct_1": Bound(min=0.0, over="champion")}
    with pytest.raises(InputError, match="the champion abc123 was evaluated without eval/distinct_1"):
        check_champion(thresholds, CHAMPION)
    check_champion(thresholds, None)
    check_champion({"eval/distinct_1": Bound(min=0.0)}, CHAMPION)


def refusal(metric: str, **bound: Any) -> str:
    with pytest.raises(InputError) as raised:
        check_names({metric: Bound(**bound)}, ["eval/win_rate"], ["eval/distinct_1"], ["fact"])
    return str(raised.value)


def test_a_metric_that_is_not_measured_is_refused_with_those_that_are() -> None:
    message = refusal("eval/winrate", min=0.5)
    assert "evaluate.thresholds: 'eval/winrate'" in message and "Did you mean eval/win_rate?" in message
    assert "Accepted: eval/distinct_1, eval/win_rate." in message and "eval/win_rate/fact" in message
    assert "evaluate.judge" in refusal("gold/harmful", max=0.05)
    refusal("eval/distinct_1/fact", min=0)
    check_names({"eval/win_rate/fact": Bound(min=0)}, ["eval/win_rate"], [], ["fact"])


def test_an_end_of_an_interval_that_does_not_exist_is_refused() -> None:
    assert "no interval" in refusal("eval/distinct_1", min=0.1, at="low")


@pytest.mark.parametrize(
    ("bound", "problem"), [({}, "neither min nor max"), ({"min": 2, "max": 1}, "min 2.0 above max 1.0")]
)
def test_a_bound_that_says_nothing_or_contradicts_itself_is_refused(bound: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        parse(EvaluateSettings, {"thresholds": {"eval/win_rate": bound}})


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of judges, importable while a test runs."""
    module = ModuleType("some_judges")
    monkeypatch.setitem(sys.modules, "some_judges", module)
    return module


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("judge_all", "accepted: module:function"),
        (":judge_all", "accepted: module:function"),
        ("no_such_package.judge:judge_all", "cannot be imported"),
        ("some_judges:missing", "no function 'missing'"),
    ],
)
def test_a_judge_that_is_not_there_is_refused(name: str, problem: str, judges: ModuleType) -> None:
    with pytest.raises(InputError, match=problem) as raised:
        Judge(name)
    assert str(raised.value).startswith(f"evaluate.judge is {name!r}")


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        (None, "gave back NoneType for 2 responses"),
        ([{"helpful": True}], "gave back 1 of them for 2 responses"),
        ([{"helpful": True}, True], "verdict 2 is True"),
        ([{"helpful": True}, {"helpful": 0.7}], "verdict 2 says 'helpful': 0.7"),
        ([{"harmles": True}, {}], "verdict 1 says 'harmles': True"),
    ],
)
def test_a_judge_that_answers_in_another_form_is_refused(
    answers: Any, problem: str, judges: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judges, "judge", lambda prompts, responses: answers, raising=False)
    with pytest.raises(InputError, match=problem) as raised:
        Judge("some_judges:judge").verdicts(["a", "b"], ["c", "d"])
    assert str(raised.value).startswith("evaluate.judge: some_judges:judge")


def test_a_question_that_a_judge_leaves_out_does_not_apply(
    judges: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judges, "judge", lambda prompts, responses: [{"harmful": False}], raising=False)
    (verdict,) = Judge("some_judges:judge").verdicts(["a"], ["b"])
    assert verdict == {"helpful": None, "harmful": False, "honest": None, "over_refusal": None}
