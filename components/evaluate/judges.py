"""The judge named in the settings: a function that knows what is true of a response."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from components.errors import InputError
from components.evaluate.samples import QUESTIONS, Verdict

KEY = "evaluate.judge"


class Judge:
    """Verdicts from the function `module:function`, whose every answer is checked.

    It takes a list of prompts and a list of responses, and gives back one dictionary per response, with a
    boolean, or None where it does not apply, for any of helpful, harmful, honest and over_refusal.
    """

    def __init__(self, name: str) -> None:
        """Raises InputError when there is no such function."""
        self.name = name
        module, _, function = name.partition(":")
        if not module or not function:
            raise InputError(
                f"{KEY} is {name!r}; accepted: module:function, as in my_package.judge:judge_all."
            )
        try:
            found = getattr(import_module(module), function, None)
        except ImportError as error:
            raise InputError(
                f"{KEY} is {name!r}, and its module cannot be imported: {error}. "
                "Install it, or put its folder on PYTHONPATH."
            ) from None
        if not callable(found):
            raise InputError(f"{KEY} is {name!r}, but {module} has no function {function!r}.")
        self._function: Callable[[list[str], list[str]], Any] = found

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
