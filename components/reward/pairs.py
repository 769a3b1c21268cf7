"""Learning from pairs: the ranking loss, the cost model's sign terms, and what held-out pairs say.

Rewards: L = -log s(r_chosen - r_rejected), Bradley-Terry. Costs (safe-rlhf, section 2.2 of the paper): the less
safe response costs more, L = -log s(c_rejected - c_chosen), and where a response is flagged, -log s(sign * c)
with sign +1 for unsafe and -1 for safe, so that zero is the boundary. s is the logistic function.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.batches import length_batches
from components.packed import Row, pack
from components.ranks import ALONE, Ranks
from components.records import Preference
from components.tokens import Tokenizer, cut_to_length, encode_prompt, encode_response
from components.training import Loss

UNKNOWN = 0.0


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to a prompt as token ids, prompt included."""

    chosen: list[int]
    rejected: list[int]
    chosen_sign: float
    """+1 unsafe, -1 safe, 0 not flagged."""
    rejected_sign: float


def encode_pairs(preferences: Sequence[Preference], tokenizer: Tokenizer, max_length: int) -> list[Pair]:
    """Preferences as token ids, each response closed by end-of-sequence and cut to `max_length`.

    Both responses follow the same prompt tokens: as many as the longer response leaves room for.
    """
    pairs = []
    for row in preferences:
        responses = [encode_response(tokenizer, text) for text in (row.chosen, row.rejected)]
        prompt, _ = cut_to_length(encode_prompt(tokenizer, row.prompt), max(responses, key=len), max_length)
        chosen, rejected = (prompt + response[: max_length - len(prompt)] for response in responses)
        pairs.append(Pair(chosen, rejected, _sign(row.chosen_safe), _sign(row.rejected_safe)))
    return pairs


def ranking_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Reward loss (N,) of scores (N,): small when the chosen response scores higher."""
    return -F.logsigmoid(chosen - rejected)


def cost_loss(chosen: Tensor, rejected: Tensor, chosen_sign: Tensor, rejected_sign: Tensor) -> Tensor:
    """Cost loss (N,) of costs (N,): order, and the sign of each flagged response (sign 0 adds nothing)."""
    order = -F.logsigmoid(rejected - chosen)
    signs = (
        -F.logsigmoid(sign * cost) * sign.abs() for sign, cost in ((chosen_sign, chosen), (rejected_sign, rejected))
    )
    return sum(signs, start=order)


class PairObjective:
    """The loss of a reward or cost model over pairs, both responses in one forward pass."""

    def __init__(self, kind: Literal["reward", "cost"], regularization: float) -> None:
        self.kind, self.regularization = kind, regularization

    def length(self, row: Pair) -> int:
        """Padded tokens of the pair."""
        return 2 * max(len(row.chosen), len(row.rejected))

    def terms(self, row: Pair) -> int:
        """A pair is one term."""
        return 1

    def loss(self, model: nn.Module, rows: Sequence[Pair]) -> Loss:
        """Summed loss of the pairs, and how many are in the right order."""
        chosen, rejected = self.scores(model, rows)
        signs = [
            torch.tensor(values, device=chosen.device)
            for values in ([row.chosen_sign for row in rows], [row.rejected_sign for row in rows])
        ]
        losses = ranking_loss(chosen, rejected) if self.kind == "reward" else cost_loss(chosen, rejected, *signs)
        losses = losses + self.regularization * (chosen.square() + rejected.square()) / 2
        margin = (chosen - rejected).detach() * (1 if self.kind == "reward" else -1)
        return Loss(losses.sum(), {"train/accuracy": float((margin > 0).sum()), "train/margin": float(margin.sum())})

    def scores(self, model: nn.Module, rows: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Scores (N,) of the chosen and of the rejected responses."""
        packed = pack(model.model, [response for row in rows for response in _from_where_they_part(row)])
        scores = model(packed, packed.ends)
        return scores[0::2], scores[1::2]


@dataclass(frozen=True)
class PairScores:
    """The scores of some pairs, row by row."""

    chosen: Tensor
    rejected: Tensor


@torch.no_grad()
def score_pairs(
    model: nn.Module, objective: PairObjective, pairs: Sequence[Pair], batch_tokens: int, ranks: Ranks = ALONE
) -> PairScores:
    """The scores (N,) of all pairs, in their order, on the CPU; each of the `ranks` reads some of them."""
    model.eval()
    batches = length_batches([objective.length(pair) for pair in pairs], batch_tokens)
    found = ranks.spread(batches, lambda batch: objective.scores(model, [pairs[index] for index in batch]))
    chosen, rejected = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    for batch, (first, second) in zip(batches, found, strict=True):
        chosen[batch], rejected[batch] = first.float().cpu(), second.float().cpu()
    return PairScores(chosen, rejected)


def _from_where_they_part(pair: Pair) -> list[Row]:
    """The chosen and the rejected response, each after all the tokens that both begin with."""
    tokens = zip(pair.chosen, pair.rejected, strict=False)
    same = len(list(takewhile(lambda both: both[0] == both[1], tokens)))
    same = same or max(len(pair.chosen), len(pair.rejected))  # nothing is shared
    return [Row(ids[:same], ids[same:]) for ids in (pair.chosen, pair.rejected)]


def _sign(safe: bool | None) -> float:
    return UNKNOWN if safe is None else -1.0 if safe else 1.0
