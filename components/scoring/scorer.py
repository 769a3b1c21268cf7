"""What a scorer is, and what its scores must be: one finite number per response."""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from components.artifacts import Metrics
from components.errors import InputError
from components.generation import Response
from components.records import Conversation, prompt_text

Role = Literal["reward", "cost"]
"""What scores are for: a reward is better when higher, a cost when lower."""
SHOWN = 60  # characters of a prompt in a message


class Scorer(Protocol):
    """Anything that scores responses."""

    metrics: Metrics
    """Numbers about the last call, such as rollout/reward_disagreement; empty where there is nothing to say."""

    def score(self, prompts: Sequence[Conversation], responses: Sequence[Response]) -> Tensor:
        """Scores (B,), float32, on the CPU; `responses` (B) answer `prompts` (B) one by one.

        Raises InputError when what computes them gives back anything but one finite number per response.
        """
        ...


def checked(scores: Tensor, prompts: Sequence[Conversation], who: str) -> Tensor:
    """The scores (B,) as float32 on the CPU, without a gradient.

    Raises InputError naming `who` gave them, and how many or what is wrong, for another shape and for NaN or infinity.
    """
    wanted = (len(prompts),)
    if tuple(scores.shape) != wanted:
        raise InputError(
            f"{who} gave back scores of shape {tuple(scores.shape)} for {len(prompts)} responses; accepted: one number "
            f"per response, shape {wanted}."
        )
    scores = scores.detach().to("cpu", torch.float32)
    broken = ~torch.isfinite(scores)
    if broken.any():
        first = int(broken.nonzero()[0])
        raise InputError(
            f"{who}: {int(broken.sum())} of {len(prompts)} scores are not finite; the first is {float(scores[first])}, "
            f"of a response to the prompt that starts {prompt_text(prompts[first])[:SHOWN]!r}. "
            "Nothing can be learned from them: mend what computes the scores, or leave such prompts out."
        )
    return scores
