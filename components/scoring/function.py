"""Scores from a Python function: a person's own code, named in the settings.

The function takes the prompts, each a list of messages ({"role": ..., "content": ...}, the last one the user's), and
the responses (text), and gives back one number per response: a list, an array or a tensor.

    def brevity(prompts: list[list[dict[str, str]]], responses: list[str]) -> list[float]:
        return [-len(response.split()) / 50 for response in responses]

It is named as `my_package.scorers:brevity`, or as `brevity` where its package registers it:

    [project.entry-points."plumbline.scorers"]
    brevity = "my_package.scorers:brevity"
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from components.artifacts import Metrics
from components.errors import InputError
from components.extensions import named_function
from components.generation import Response
from components.records import Conversation
from components.scoring.scorer import Role, checked

GROUP = "plumbline.scorers"


class FunctionScorer:
    """A function of prompts and responses."""

    def __init__(self, name: str, role: Role) -> None:
        """Raises InputError when there is no such function."""
        key = f"rl.{role}_scorer.name"
        self.name = f"{key} ({name})"
        self.metrics: Metrics = {}
        self._function = named_function(name, key, GROUP)

    def score(self, prompts: Sequence[Conversation], responses: Sequence[Response]) -> Tensor:
        """The function's scores (B,). Raises RuntimeError naming the function when it raises anything."""
        asked = [[asdict(message) for message in prompt] for prompt in prompts]
        try:
            given = self._function(asked, [response.text for response in responses])
        except Exception as error:  # a person's own code may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"{self.name} failed on {len(responses)} responses: {reason}") from error
        return checked(self._numbers(given), prompts, self.name)

    def _numbers(self, given: Any) -> Tensor:
        """What the function gave back as a tensor. Raises InputError for what holds no numbers."""
        try:
            return torch.as_tensor(given, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(
                f"{self.name} gave back {type(given).__name__} ({reason}); accepted: a list with one number per "
                "response, or an array or tensor of them."
            ) from None
