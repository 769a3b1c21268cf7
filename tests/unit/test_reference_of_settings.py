"""pipeline/README.md describes every setting as the classes define it."""

import re

from pydantic import BaseModel, Field

from components.settings import Group
from pipeline.reference import README, classes, reference, section, written
from pipeline.settings import TASKS, Settings


class Inner(Group):
    """What is below."""

    size: int = 3
    """How large."""


class Outer(Group):
    """What is above.

    And more of it.
    """

    share: float | None = Field(None, gt=0, le=1)
    """A share | of all,
    over two lines."""
    inner: Inner = Inner(size=5)
    """The other."""


def test_the_readme_says_what_the_classes_say() -> None:
    text = README.read_text("utf-8")
    assert written(text) == text, "run `python -m pipeline.reference`"


def test_a_row_has_kinds_bounds_default_and_meaning() -> None:
    assert section(Outer).splitlines() == [
        "### Outer",
        "",
        "What is above.",
        "",
        "| key | accepted | default | |",
        "|---|---|---|---|",
        "| `share` | number > 0, ≤ 1, or none | none | A share \\| of all, over two lines. |",
        "| `inner` | [Inner](#inner) | `size: 5` | The other. |",
    ]


def test_every_class_is_there_once_every_key_is_described_and_every_link_leads_somewhere() -> None:
    found = classes(Settings)
    assert len(found) == len(set(found)) > 35 and all(issubclass(model, BaseModel) for model in found)
    assert {type(getattr(Settings(), task)) for task in TASKS if task != "demo"} <= set(found)
    assert [(model, name) for model in found for name, f in model.model_fields.items() if not f.description] == []
    text = reference()
    headings = {heading.lower() for heading in re.findall(r"^### (\w+)$", text, re.M)}
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= headings
