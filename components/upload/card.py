"""The model card: README.md in the form the Hugging Face hub reads, written from what the folders state.

It holds no date and no path, so the same model with the same report has the same digest wherever it is
published.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from components.artifacts import ModelCard, folder_digest, read_manifest

TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [plumbline, rlhf]
---

# {name}

A {kind} written by the {step} step of plumbline {code_version}. The evaluation gate: **{gate}**.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
```

Prompts go through the chat template stored with the tokenizer.

## Evaluation

| metric | value |
|---|---|
{metrics}

## Made from

| what | digest |
|---|---|
{digests}

## Settings

```json
{settings}
```
"""


def model_card(name: str, model: Path, report: Path, evaluation: Mapping[str, Any]) -> str:
    """The text of the card for the model folder and its evaluation (the content of report.json)."""
    manifest, card = read_manifest(model), ModelCard.read(model)
    digests = {
        "trained model": manifest["digest"],
        "evaluation report": folder_digest(report),
        "chat template": card.template_digest,
        "training started from": card.base,
        **manifest["parents"],
    }
    return TEMPLATE.format(
        name=name,
        kind=card.kind,
        step=card.step,
        code_version=manifest["code_version"],
        gate="passed" if evaluation["passed"] else "not passed",
        metrics=_rows(_numbers(evaluation.get("metrics", {}))),
        digests=_rows((what, f"`{digest}`") for what, digest in digests.items() if digest),
        settings=json.dumps(manifest["settings"], indent=2, ensure_ascii=False),
    )


def _numbers(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Every number of nested metrics under its name, with its interval where one is given."""
    for name, value in values.items():
        if isinstance(value, Mapping) and "mean" in value:
            interval = (
                f" ({value['low']:.4g} to {value['high']:.4g})" if {"low", "high"} <= value.keys() else ""
            )
            yield f"{above}{name}", f"{value['mean']:.4g}{interval}"
        elif isinstance(value, Mapping):
            yield from _numbers(value, f"{above}{name}/")
        elif isinstance(value, int | float):
            yield f"{above}{name}", f"{value:.4g}"


def _rows(pairs: Any) -> str:
    """The lines of a table with two columns."""
    return "\n".join(f"| {name} | {value} |" for name, value in pairs) or "| none | |"
