"""From logits to tokens: temperature, top-k, nucleus, and the log-probability of what was taken, in one pass.

Shapes: B rows, V vocabulary.
"""

import torch
from torch import Tensor

from components.settings import Generation


def pick(logits: Tensor, draws: Tensor, generation: Generation) -> tuple[Tensor, Tensor]:
    """Token ids (B,) and their log-probabilities (B,) by inverting each row's cumulative distribution.

    `logits` (B, V), `draws` (B,) uniform in [0, 1). Log-probabilities are float32 and those of the truncated and
    tempered distribution that was sampled. Temperature 0 takes the likeliest token, whose log-probability is 0.
    """
    if generation.temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    logprobs = torch.log_softmax(logits.float() / generation.temperature, dim=-1)
    if generation.top_k or generation.top_p < 1:
        logprobs = torch.log_softmax(truncate(logprobs, generation.top_k, generation.top_p), dim=-1)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)  # in float32 late tokens of a large V would be lost
    target = draws.double()[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    return token.squeeze(1), logprobs.gather(1, token).squeeze(1)


def truncate(logprobs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Log-probabilities (B, V) with -inf outside the top k tokens and outside the nucleus of mass top_p."""
    ordered, order = logprobs.sort(dim=-1, descending=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k:
        drop[:, top_k:] = True
    mass_before = ordered.exp().cumsum(-1) - ordered.exp()
    drop |= mass_before >= top_p
    drop[:, 0] = False
    return logprobs.masked_fill(drop.scatter(1, order, drop), float("-inf"))
