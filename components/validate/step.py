"""The validate step: every row and the base model's folder are checked before anything is trained."""

import logging
from collections.abc import Sequence
from pathlib import Path

from components import tracking
from components.artifacts import DataDir, Metrics, write_manifest
from components.errors import InputError
from components.records import DIMENSIONS, KINDS, SPLITS
from components.validate.amounts import amounts, check_amounts
from components.validate.base_model import check_base_model
from components.validate.findings import Findings
from components.validate.lengths import Lengths, check_lengths
from components.validate.overlap import check_duplicates, check_leakage
from components.validate.report import Report
from components.validate.rows import CheckedRow, check_rows
from components.validate.settings import ValidateSettings

logger = logging.getLogger(__name__)


def run(settings: ValidateSettings, *, data: Path, base: Path, report: Path) -> Metrics:
    """How many rows, errors and warnings there are, token lengths, and shares of what is in the data.

    Writes report.json and report.html to `report`. Raises InputError after that when there are errors, naming
    the first of them with file, row and field. No weights are loaded.
    """
    findings = Findings(settings.max_findings)
    model = check_base_model(base, settings.max_length, findings)
    rows = [
        row for kind in KINDS for split in SPLITS for row in check_rows(DataDir(data), kind, split, findings)
    ]
    check_amounts(rows, settings, findings)
    overlap = {
        "validate/num_leaked": float(check_leakage(rows, findings)),
        "validate/num_duplicates": float(check_duplicates(rows, findings)),
    }
    lengths = check_lengths(rows, model.tokenizer, settings, findings) if model.tokenizer is not None else []
    metrics = _metrics(rows, lengths, findings) | overlap
    result = Report(findings, amounts(rows), lengths, model, metrics, settings)
    page = result.write(report)
    # An input that is missing is a finding, and has no digest to name.
    parents = {name: folder for name, folder in (("data", data), ("base", base)) if folder.is_dir()}
    write_manifest(report, "report", settings=settings.model_dump(mode="json"), parents=parents)
    tracking.log_artifacts(report)
    logger.info("validate: %s; report in %s", metrics, page)
    if not result.passed:
        raise InputError(findings.message(page))
    return metrics


def _metrics(rows: Sequence[CheckedRow], lengths: Sequence[Lengths], findings: Findings) -> Metrics:
    preferences = [row for row in rows if row.kind == "preferences"]
    metrics = {
        "validate/num_rows": float(len(rows)),
        "validate/num_errors": float(findings.number("error")),
        "validate/num_warnings": float(findings.number("warn")),
    }
    for dimension in DIMENSIONS:
        labelled = sum(row.label == dimension for row in preferences)
        metrics[f"validate/share_{dimension}"] = labelled / max(1, len(preferences))
    for row in lengths:
        metrics[f"validate/{row.kind}_tokens_p50"] = float(row.p50)
        metrics[f"validate/{row.kind}_tokens_p95"] = float(row.p95)
        metrics[f"validate/{row.kind}_tokens_max"] = float(row.longest)
        metrics[f"validate/{row.kind}_truncated"] = row.truncated
    return metrics
