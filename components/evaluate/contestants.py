"""A model in the comparison: its responses, and how likely it finds responses and held-out demonstrations."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.artifacts import ModelCard
from components.batches import length_batches
from components.divergence import kl_estimate
from components.errors import InputError
from components.evaluate.settings import EvaluateSettings
from components.generation import Response, respond
from components.likelihood import demonstration_passages, evaluate_likelihood
from components.logprobs import LanguageModel, response_logprobs
from components.models import load_policy
from components.precision import serving_dtype
from components.progress import Progress
from components.records import Conversation, Demonstration
from components.tokens import Tokenizer, encode_prompt, load_tokenizer, pad


@dataclass(frozen=True)
class Contestant:
    """What one model did."""

    responses: list[Response]
    logprobs: list[Tensor]
    """Of the policy's responses, token by token, under this model: one tensor (R,) each."""
    perplexity: float
    """On held-out demonstrations; NaN where there are none."""


def common_tokenizer(policy: Path, baseline: Path) -> Tokenizer:
    """The tokenizer of both models.

    Raises InputError where their templates or vocabularies differ: they would not answer the same question,
    and the KL between them would mean nothing.
    """
    digests = {folder: ModelCard.read(folder).template_digest for folder in (policy, baseline)}
    if len(set(digests.values())) > 1:
        raise InputError(
            f"the chat templates differ: {policy} has the digest {digests[policy]}, {baseline} has "
            f"{digests[baseline]} (card.json). Compare models that were trained with one template."
        )
    tokenizer, other = load_tokenizer(policy), load_tokenizer(baseline)
    if tokenizer.get_vocab() != other.get_vocab():
        raise InputError(
            f"{policy} and {baseline} have different vocabularies ({len(tokenizer)} and {len(other)} "
            "tokens). Compare a policy with the model it was trained from."
        )
    return tokenizer


def observe(
    folder: Path,
    tokenizer: Tokenizer,
    prompts: Sequence[Conversation],
    demonstrations: Sequence[Demonstration],
    settings: EvaluateSettings,
    sampled: Sequence[Response] | None = None,
) -> Contestant:
    """What the model in `folder` does; its log-probabilities are those of `sampled`, or of its own responses.

    The model leaves memory with the return, so that only one is held at a time.
    """
    model = load_policy(folder, serving_dtype() if settings.dtype == "serving" else settings.dtype)
    responses = respond(model, tokenizer, prompts, settings.generation, settings.seed)
    judged = responses if sampled is None else sampled
    logprobs = _logprobs(model, tokenizer, prompts, judged, settings)
    longest = settings.generation.max_prompt_tokens + settings.generation.max_new_tokens
    passages = demonstration_passages(demonstrations, tokenizer, longest)
    found = evaluate_likelihood(LanguageModel(model), passages, settings.batch_tokens)
    return Contestant(responses, logprobs, found.get("eval/perplexity", float("nan")))


def divergence(policy: Tensor, baseline: Tensor) -> tuple[float, float]:
    """The estimates k1 and k3 of KL(policy || baseline), summed over one response's log-probabilities (R,)."""
    return float(kl_estimate(policy, baseline, "k1").sum()), float(kl_estimate(policy, baseline, "k3").sum())


@torch.no_grad()
def _logprobs(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Conversation],
    responses: Sequence[Response],
    settings: EvaluateSettings,
) -> list[Tensor]:
    """Log-probabilities (R,) of the sampled tokens of each response, at the temperature they were sampled at."""
    generation = settings.generation
    temperature = generation.temperature or 1.0
    heads = [encode_prompt(tokenizer, prompt)[-generation.max_prompt_tokens :] for prompt in prompts]
    tails = [response.ids for response in responses]
    result = [torch.zeros(0) for _ in responses]
    progress = Progress("likelihoods", len(tails))
    device = next(model.parameters()).device
    lengths = [len(head) + len(tail) for head, tail in zip(heads, tails, strict=True)]
    for rows in length_batches(lengths, settings.batch_tokens):
        left, left_mask = pad([heads[i] for i in rows], tokenizer.eos_token_id, side="left")
        right, right_mask = pad([tails[i] for i in rows], tokenizer.eos_token_id)
        ids, mask = torch.cat([left, right], 1).to(device), torch.cat([left_mask, right_mask], 1).to(device)
        taken = response_logprobs(model, ids, mask, right.shape[1], temperature)[0].cpu()
        for row, index in enumerate(rows):
            result[index] = taken[row, : len(tails[index])]
        progress.advance(len(rows))
    return result
