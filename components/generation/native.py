"""Our decoder: prompts in one batch, one forward pass per token, ended rows leave the batch.

Sampling and the sampled token's log-probability come from the same float32 softmax, so that what the trainer
later calls the old policy is the distribution that was really sampled.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from components.generation import Samples
from components.models import end_ids
from components.settings import Generation
from components.tokens import pad, position_ids


class NativeSampler:
    """Samples from a Hugging Face causal model in this process."""

    def __init__(self, model: Any, eos_token_id: int, generation: Generation, seed: int) -> None:
        self.model, self.eos, self.generation = model, eos_token_id, generation
        self.ends = end_ids(model, eos_token_id)
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sequence[int]], k: int = 1) -> Samples:
        """`k` responses to each prompt; a row depends on its own prompt and random draws alone.

        Prompts are padded on the left and positions counted over real tokens. Every row's draws are consumed
        whether it has ended or not, so a row's response does not depend on when its neighbours end.
        """
        was_training = self.model.training
        self.model.eval()
        rows = [prompt for prompt in prompts for _ in range(k)]
        try:
            return self._decode(rows)
        finally:
            self.model.train(was_training)

    def _decode(self, rows: Sequence[Sequence[int]]) -> Samples:
        device = next(self.model.parameters()).device
        ids, mask = (tensor.to(device) for tensor in pad(rows, self.eos, side="left"))
        length = self.generation.max_new_tokens
        out = torch.full((len(rows), length), self.eos, device=device)
        out_mask = torch.zeros((len(rows), length), dtype=torch.bool, device=device)
        logprobs = torch.zeros((len(rows), length), device=device)
        ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
        alive = torch.arange(len(rows), device=device)
        draws = torch.rand((length, len(rows)), generator=self.generator).to(device)
        positions, cache, ends = position_ids(mask), None, torch.tensor(self.ends, device=device)
        for step in range(length):
            output = self.model(
                input_ids=ids,
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            token, logprob = pick(output.logits[:, -1], draws[step, alive], self.generation)
            out[alive, step], logprobs[alive, step], out_mask[alive, step] = token, logprob, True
            goes_on = ~torch.isin(token, ends)
            ended[alive[~goes_on]] = True
            if not goes_on.any() or step == length - 1:
                break
            if not goes_on.all():
                alive, token, mask = alive[goes_on], token[goes_on], mask[goes_on]
                cache.batch_select_indices(goes_on.nonzero().squeeze(1))
                positions = positions[goes_on]
            ids, mask = token[:, None], torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
            positions = positions[:, -1:] + 1
        used = int(out_mask.any(0).sum())
        return Samples(out[:, :used], out_mask[:, :used], logprobs[:, :used], ended)


def pick(logits: Tensor, draws: Tensor, generation: Generation) -> tuple[Tensor, Tensor]:
    """Token ids (B,) and their log-probabilities (B,) by inverting each row's cumulative distribution.

    `logits` (B, V), `draws` (B,) uniform in [0, 1). Log-probabilities are those of the truncated and tempered
    distribution that was sampled. Temperature 0 takes the likeliest token, whose log-probability is 0.
    """
    if generation.temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    logprobs = torch.log_softmax(logits.float() / generation.temperature, dim=-1)
    if generation.top_k or generation.top_p < 1:
        logprobs = torch.log_softmax(truncate(logprobs, generation.top_k, generation.top_p), dim=-1)
    cumulative = logprobs.double().exp().cumsum(-1)
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
