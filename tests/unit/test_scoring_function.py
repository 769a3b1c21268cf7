"""Scores from a function: found by path or entry point, asked once, its answers checked."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch

from components.errors import InputError
from components.generation import Response
from components.records import Message
from components.scoring import FunctionScorer

PROMPTS = [(Message("user", "say red"),), (Message("system", "be kind"), Message("user", "say blue 🙂"))]
RESPONSES = [Response("red", (1,), True), Response("sky blue", (2, 3), False)]


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of a person's own, importable while a test runs."""
    module = ModuleType("own_scorers")
    monkeypatch.setitem(sys.modules, "own_scorers", module)
    return module


def register(folder: Path, monkeypatch: pytest.MonkeyPatch, package: str, **points: str) -> None:
    """Put an installed distribution with these entry points on the path."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[plumbline.scorers]\n{lines}")
    monkeypatch.syspath_prepend(str(folder))


def refusal(name: str, role: Any = "reward") -> str:
    with pytest.raises(InputError) as raised:
        FunctionScorer(name, role)
    return str(raised.value)


def answer(own: ModuleType, given: Any) -> torch.Tensor:
    own.scores = lambda prompts, responses: given
    return FunctionScorer("own_scorers:scores", "reward").score(PROMPTS, RESPONSES)


def test_a_function_gets_messages_and_texts_and_its_numbers_are_the_scores(own: ModuleType) -> None:
    asked: list[Any] = []

    def scores(prompts: list[list[dict[str, str]]], responses: list[str]) -> list[float]:
        asked.append((prompts, responses))
        return [len(response) / 2 for response in responses]

    own.scores = scores
    scorer = FunctionScorer("own_scorers:scores", "reward")
    given = scorer.score(PROMPTS, RESPONSES)
    assert given.tolist() == [1.5, 4] and given.dtype == torch.float32 and scorer.metrics == {}
    system, user = {"role": "system", "content": "be kind"}, {"role": "user", "content": "say blue 🙂"}
    assert asked == [([[{"role": "user", "content": "say red"}], [system, user]], ["red", "sky blue"])]


@pytest.mark.parametrize(
    "given",
    [(1, 2), numpy.array([1.0, 2]), torch.tensor([1.0, 2], requires_grad=True), [numpy.float32(1), torch.tensor(2)]],
    ids=["tuple", "array", "tensor", "scalars"],
)
def test_any_sequence_of_numbers_will_do(given: Any, own: ModuleType) -> None:
    assert answer(own, given).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([1.0], "shape (1,) for 2 responses"),
        ([[1.0], [2.0]], "shape (2, 1) for 2 responses"),
        (1.0, "shape () for 2 responses"),
        ([1.0, float("nan")], "1 of 2 scores are not finite; the first is nan"),
        ([1.0, 1e300], "1 of 2 scores are not finite; the first is inf"),
        (["good", "bad"], "gave back list"),
        ([1.0, None], "gave back list"),
        (None, "gave back NoneType"),
        ((score for score in (1.0, 2.0)), "gave back generator"),
        ([[1.0], [2.0, 3.0]], "gave back list"),
    ],
)
def test_anything_but_one_finite_number_per_response_is_refused(given: Any, words: str, own: ModuleType) -> None:
    with pytest.raises(InputError) as raised:
        answer(own, given)
    assert str(raised.value).startswith("rl.reward_scorer.name (own_scorers:scores)")
    assert words in str(raised.value)


def test_what_a_function_raises_is_a_failure_that_names_the_function(own: ModuleType) -> None:
    def scores(prompts: Any, responses: Any) -> Any:
        raise KeyError("lexicon")

    own.scores = scores
    with pytest.raises(RuntimeError, match=r"rl\.cost_scorer\.name \(own_scorers:scores\) failed on 2 .*KeyError"):
        FunctionScorer("own_scorers:scores", "cost").score(PROMPTS, RESPONSES)


def test_an_entry_point_is_found_by_its_name(
    own: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.scores = lambda prompts, responses: [7.0] * len(responses)
    register(tmp_path, monkeypatch, "own-package", sevens="own_scorers:scores", broken="own_scorers:missing")
    assert FunctionScorer("sevens", "reward").score(PROMPTS, RESPONSES).tolist() == [7, 7]
    assert "own_scorers has no function 'missing'" in refusal("broken")
    unknown = refusal("eights", "cost")
    assert unknown.startswith("rl.cost_scorer.name is 'eights'; accepted: module:function, or the name of an entry")
    assert "plumbline.scorers (broken, sevens)" in unknown


def test_without_any_entry_point_the_message_says_so() -> None:
    assert "plumbline.scorers (none is installed)" in refusal("eights")


def test_a_name_that_two_packages_register_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("one", "two"):
        register(tmp_path / package, monkeypatch, package, sevens=f"{package}:scores")
    message = refusal("sevens")
    assert "several packages register (one, two)" in message and "one:scores or two:scores" in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (":scores", "accepted: module:function"),
        ("own_scorers:", "accepted: module:function"),
        ("no_such_package:scores", "cannot be imported"),
        ("own_scorers:missing", "has no function 'missing'"),
        ("own_scorers:number", "has no function 'number'"),
    ],
)
def test_a_function_that_is_not_there_is_refused(name: str, words: str, own: ModuleType) -> None:
    own.number = 3
    message = refusal(name)
    assert message.startswith(f"rl.reward_scorer.name is {name!r}") and words in message
