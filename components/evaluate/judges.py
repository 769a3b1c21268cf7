"""The judge named in the settings: a function that knows what is true of a response."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from components.errors import InputError
from components.evaluate.samples import QUESTIONS, Verdict
from components.extensions import named_function

KEY = "evaluate.judge"


class Judge:
    """Verdicts from the function `module:function`, whose every answer is checked.

    It takes a list of prompts and a list of responses, and gives back one dictionary per response, with a
    boolean, or None where it does not apply, for any of helpful, harmful, honest and over_refusal.
    """

    def __init__(self, name: str) -> None:
        """Raises InputError when there is no such function."""
        self.name = name
        self._function: Callable[[list[str], list[str]], Any] = named_function(name, KEY)

    def verdicts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """One verdict per response, with every question in it.

        Raises InputError for an answer of another form.
        """
        answers = self._function(list(prompts), list(responses))
        if not isinstance(answers, list | tuple) or len(answers) != len(responses):
            seen = f"{len(answers)} of them" if isinstance(answers, list | tuple) else type(answers).__name__
            raise InputError(
                f"{KEY}: {self.name} gave back {seen} for {len(responses)} responses; "
                "accepted: a list with one dictionary per response."
            )
        return [self._verdict(number, answer) for number, answer in enumerate(answers, start=1)]

    def _verdict(self, number: int, answer: Any) -> Verdict:
        accepted = f"accepted: true, false or None for {', '.join(QUESTIONS)}"
        where = f"{KEY}: {self.name}, verdict {number}"
        if not isinstance(answer, Mapping):
            raise InputError(f"{where} is {answer!r}; {accepted}.")
        for name, value in answer.items():
            if name not in QUESTIONS or not isinstance(value, bool | None):
                raise InputError(f"{where} says {name!r}: {value!r}; {accepted}.")
        return {name: answer.get(name) for name in QUESTIONS}
