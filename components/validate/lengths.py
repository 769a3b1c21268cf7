"""Token lengths under the base model's own tokenizer and chat template: what fits into max_length."""

from collections.abc import Sequence
from dataclasses import dataclass

from components.progress import Progress
from components.records import KINDS, Conversation
from components.tokens import Tokenizer, encode_prompt, encode_response
from components.validate.findings import Findings, Place
from components.validate.rows import RESPONSES, CheckedRow
from components.validate.settings import ValidateSettings

REPORT_EVERY = 200
"""Rows between two looks at the clock of the progress line."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token lengths of one kind's sequences: prompt and response together, or the prompt alone."""

    kind: str
    num_sequences: int
    p50: int
    p95: int
    p99: int
    longest: int
    truncated: float
    """Share of sequences longer than max_length, from 0 to 1."""


class Ruler:
    """Token lengths of prompts and responses; a text that occurs in many rows is tokenised once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._prompts: dict[Conversation, int] = {}
        self._responses: dict[str, int] = {}

    def prompt(self, prompt: Conversation) -> int:
        """Tokens of the rendered prompt. Raises jinja2.TemplateError when the chat template refuses it."""
        if prompt not in self._prompts:
            self._prompts[prompt] = len(encode_prompt(self._tokenizer, prompt))
        return self._prompts[prompt]

    def response(self, response: str) -> int:
        """Tokens of the response and of its end."""
        if response not in self._responses:
            self._responses[response] = len(encode_response(self._tokenizer, response))
        return self._responses[response]


def check_lengths(
    rows: Sequence[CheckedRow], tokenizer: Tokenizer, settings: ValidateSettings, findings: Findings
) -> list[Lengths]:
    """The token lengths of every kind that has rows; what does not fit goes to the findings."""
    ruler, progress = Ruler(tokenizer), Progress("validate", len(rows))
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for number, row in enumerate(rows, start=1):
        found[row.kind] += _sequences(row, ruler, settings, findings)
        if number % REPORT_EVERY == 0 or number == len(rows):
            progress.advance(number - progress.done)
    result = [summary(kind, lengths, settings.max_length) for kind, lengths in found.items() if lengths]
    for lengths in result:
        _check_truncated(lengths, settings, findings)
    return result


def summary(kind: str, lengths: Sequence[int], max_length: int) -> Lengths:
    """Percentiles of the lengths (the smallest length that this share of sequences does not exceed)."""
    ordered = sorted(lengths)
    p50, p95, p99 = (ordered[-(-len(ordered) * percent // 100) - 1] for percent in (50, 95, 99))
    truncated = sum(length > max_length for length in ordered) / len(ordered)
    return Lengths(kind, len(ordered), p50, p95, p99, ordered[-1], truncated)


def _check_truncated(lengths: Lengths, settings: ValidateSettings, findings: Findings) -> None:
    if lengths.truncated <= settings.max_truncated:
        return
    problem = (
        f"{lengths.truncated:.0%} of sequences are longer than validate.max_length ({settings.max_length} "
        f"tokens); accepted: {settings.max_truncated:.0%} (validate.max_truncated). Half have up to "
        f"{lengths.p50} tokens, 95% up to {lengths.p95}: raise max_length or shorten the data"
    )
    findings.error("truncated", Place(lengths.kind), None, problem)


def _sequences(row: CheckedRow, ruler: Ruler, settings: ValidateSettings, findings: Findings) -> list[int]:
    """Lengths of the row's sequences: one per response, or the prompt's."""
    from jinja2 import TemplateError

    if not row.prompt:
        return []
    try:
        prompt = ruler.prompt(row.prompt)
    except TemplateError as error:
        problem = f"the base model's chat template refuses it: {error}"
        findings.error("template", row.place, "prompt", problem, ", ".join(turn.role for turn in row.prompt))
        return []
    lengths = []
    for name, text in row.responses.items():
        response = ruler.response(text)
        lengths.append(prompt + response)
        if response >= settings.max_length:
            problem = (
                f"has {response} tokens, no room for its prompt in validate.max_length "
                f"({settings.max_length}); raise max_length, leave the row out, or have it cut with "
                "validate.overlong=warn"
            )
            findings.add(settings.overlong, "overlong", row.place, name, problem, text)
    return lengths if RESPONSES[row.kind] else [prompt]
