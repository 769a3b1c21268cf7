"""The report of validate: report.json for programs, report.html for people."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.artifacts import Metrics, write_json
from components.pages import render
from components.validate.amounts import Amount
from components.validate.base_model import BaseModel
from components.validate.findings import Findings
from components.validate.lengths import Lengths
from components.validate.settings import ValidateSettings

PAGE = "report.html"
REPORT = "report.json"
_TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True)
class Report:
    """Everything that validate learned."""

    findings: Findings
    amounts: Sequence[Amount]
    lengths: Sequence[Lengths]
    model: BaseModel
    metrics: Metrics
    settings: ValidateSettings

    @property
    def passed(self) -> bool:
        """Whether there is no error; warnings do not matter."""
        return self.findings.number("error") == 0

    def write(self, folder: Path) -> Path:
        """Write report.json and report.html to the folder; returns the page's path."""
        folder.mkdir(parents=True, exist_ok=True)
        findings = [finding.as_row() for finding in self.findings.listed()]
        content = {
            "passed": self.passed,
            "findings": findings,
            "counts": [
                {"level": level, "check": check, "count": count}
                for (level, check), count in sorted(self.findings.counts.items())
            ],
            "amounts": [asdict(amount) for amount in self.amounts],
            "lengths": [asdict(lengths) for lengths in self.lengths],
            "model": _facts(self.model),
            "metrics": self.metrics,
        }
        write_json(folder / REPORT, content)
        page = folder / PAGE
        page.write_text(render(_TEMPLATE, **content, settings=self.settings.model_dump()), encoding="utf-8")
        return page


def _facts(model: BaseModel) -> dict[str, Any]:
    """What a reader wants to know of the base model, as far as it could be read."""
    facts: dict[str, Any] = {}
    if model.config is not None:
        text = model.config.get_text_config()
        facts["type"] = model.config.model_type
        for name in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"):
            facts[name] = getattr(text, name, None)
    if model.tokenizer is not None:
        facts["tokens in the tokenizer"] = len(model.tokenizer)
        facts["end of sequence"] = model.tokenizer.eos_token
    return facts
