"""The union of scorers: told apart by `kind`, with errors that name the key."""

from typing import Any

import pytest

from components.errors import InputError
from components.parsing import parse
from components.settings import (
    EnsembleScorerSettings,
    Group,
    ModelScorerSettings,
    ScorerSettings,
    UrlScorerSettings,
)
from pipeline import overrides


class Holder(Group):
    """A step's settings, in short."""

    scorer: ScorerSettings = ModelScorerSettings()
    """Where scores come from."""


def complaint(**scorer: Any) -> str:
    with pytest.raises(InputError) as raised:
        parse(Holder, {"scorer": scorer}, prefix=("rl",))
    return str(raised.value)


def test_a_scorer_is_chosen_by_its_kind() -> None:
    given = {
        "model": {}, "ensemble": {"aggregate": "bound", "k": 2}, "function": {"name": "a:b"},
        "url": {"url": "https://scorer:8443/score?model=a"},
    }  # fmt: skip
    for kind, fields in given.items():
        scorer = parse(Holder, {"scorer": {"kind": kind, **fields}}).scorer
        assert scorer.model_dump(include={"kind", *fields}) == {"kind": kind, **fields}
    assert parse(Holder, {}).scorer == ModelScorerSettings()


def test_a_kind_alone_takes_the_defaults_of_that_kind() -> None:
    assert parse(Holder, {"scorer": {"kind": "ensemble"}}).scorer == EnsembleScorerSettings()


@pytest.mark.parametrize(
    ("scorer", "parts"),
    [
        ({"kind": "modell"}, ["rl.scorer.kind is 'modell'", "'model', 'ensemble', 'function', 'url'"]),
        ({"k": 2}, ["rl.scorer.k is unknown", "another choice of kind"]),
        ({"kind": "url", "url": "http://a/b", "k": 2}, ["rl.scorer.k is unknown", "another choice of kind"]),
        ({"kind": "url"}, ["rl.scorer.url is missing"]),
        ({"kind": "url", "url": "http://a/b", "batch_size": 0}, ["rl.scorer.batch_size is 0"]),
        ({"kind": "ensemble", "aggregate": "min"}, ["rl.scorer.aggregate is 'min'", "'mean', 'worst' or 'bound'"]),
        ({"kind": "ensemble", "k": -1}, ["rl.scorer.k is -1"]),
        ({"kind": "function"}, ["rl.scorer.name is missing"]),
        ({"kind": "function", "name": ""}, ["rl.scorer.name is ''"]),
    ],
)
def test_a_wrong_scorer_is_named_by_its_key(scorer: Any, parts: list[str]) -> None:
    message = complaint(**scorer)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("url", ["scorer:8000/score", "ftp://scorer/score", "http://", "http://a:port/", "", "http://[::1/"])
def test_what_is_no_web_address_is_refused(url: str) -> None:
    message = complaint(kind="url", url=url)
    assert message.startswith("rl.scorer.url is no web address; accepted: one such as http://")


def test_an_address_with_a_password_is_refused_and_the_password_not_shown() -> None:
    message = complaint(kind="url", url="https://me:hunter2@scorer/score")
    assert message.startswith("rl.scorer.url names a user or a password") and "token_env" in message
    assert "hunter2" not in message
    assert "hunter2" not in complaint(kind="url", url="https//me:hunter2@scorer/score")


def test_a_layer_that_names_another_kind_drops_what_only_the_former_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    below = {"scorer": {"kind": "ensemble", "aggregate": "bound", "k": 2}}
    layers = overrides._Layers(below)
    layers._merge(below, {"scorer": {"kind": "url", "url": "http://a/b"}}, (), [Holder], "in a file")
    assert parse(Holder, layers.tree).scorer == UrlScorerSettings(url="http://a/b")
