"""What a vLLM server answers to a request for completions, checked number by number."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from components.errors import InputError

SLACK = 1e-3
"""Nats by which rounding may lift a log-probability above 0."""


@dataclass(frozen=True)
class Completion:
    """A sampled response."""

    ids: list[int]
    """The tokens, the one that ended it included."""
    logprobs: list[float]
    """Of each token, under the distribution that was sampled."""
    ended: bool


def completions(
    body: Any, k: int, max_tokens: int, ends: Collection[int], vocab_size: int, name: str
) -> list[Completion]:
    """The `k` completions of an answer, in order; `ends` are the tokens that end one.

    Raises InputError, under the server's `name`, for anything that does not fit.
    """
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        _refuse(name, "an answer without choices", f"{k} choices")
    by_index = {choice.get("index"): choice for choice in choices}
    if by_index.keys() != set(range(k)) or len(choices) != k:
        _refuse(name, f"choices {[choice.get('index') for choice in choices]}", f"choices 0 to {k - 1}")
    return [_completion(by_index[index], max_tokens, ends, vocab_size, name) for index in range(k)]


def _completion(
    choice: dict[str, Any], max_tokens: int, ends: Collection[int], vocab_size: int, name: str
) -> Completion:
    ids, reason = choice.get("token_ids"), choice.get("finish_reason")
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        _refuse(name, f"token_ids {str(ids)[:80]}", f"ids below {vocab_size}, the policy's vocabulary")
    if not 0 < len(ids) <= max_tokens:
        _refuse(name, f"{len(ids)} tokens", f"1 to {max_tokens}")
    if reason not in ("stop", "length"):
        _refuse(name, f"finish_reason {reason!r}", "'stop' or 'length', and no other user of the server")
    stated = choice.get("logprobs")
    logprobs = stated.get("token_logprobs") if isinstance(stated, dict) else None
    if not isinstance(logprobs, list) or len(logprobs) != len(ids) or not all(map(_is_logprob, logprobs)):
        _refuse(name, f"token_logprobs {str(logprobs)[:80]}", f"{len(ids)} finite numbers of at most 0")
    ended = ids[-1] in ends
    if ended != (reason == "stop") or any(token in ends for token in ids[:-1]) or not (ended or len(ids) == max_tokens):
        _refuse(
            name,
            f"a response of {len(ids)} tokens with finish_reason {reason!r} whose last is {ids[-1]}",
            f"responses that end at the first of the tokens {sorted(ends)}, which they include, or at {max_tokens}",
        )
    return Completion(ids, [min(float(number), 0.0) for number in logprobs], ended)


def prompt_logprobs(body: Any, prompt: Sequence[int], name: str) -> list[float]:
    """The log-probabilities of the prompt's tokens but the first, from an answer that was asked for them.

    Raises InputError, under the server's `name`, for an answer without them.
    """
    choices = body.get("choices") if isinstance(body, dict) else None
    stated: Any = choices[0].get("prompt_logprobs") if choices and isinstance(choices[0], dict) else None
    try:
        return [float(place[str(token)]["logprob"]) for token, place in zip(prompt[1:], stated[1:], strict=True)]
    except (TypeError, KeyError, ValueError):
        _refuse(name, f"prompt_logprobs {str(stated)[:80]}", "one for every token of the prompt but the first")


def _is_logprob(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value <= SLACK


def _refuse(name: str, seen: str, expected: str) -> NoReturn:
    raise InputError(
        f"{name} gave back {seen}; expected: {expected}. Start a vLLM server of the version that "
        "components/generation/README.md names, with the policy that rl starts from."
    )
