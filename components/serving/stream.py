"""One response, token by token: sampling on the key-value cache, and text that is safe to show as it comes.

The distribution is the one of training and evaluation (`components.generation`). Text is held back where
showing it could be wrong: half of a UTF-8 character, or the beginning of what may become a stop string.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from components.generation.picking import pick
from components.settings import Generation
from components.tokens import Tokenizer

INCOMPLETE = "\ufffd"
"""What decoders write for bytes that are no whole character (yet)."""


@dataclass(frozen=True)
class Sampling:
    """How one response is sampled and where it ends."""

    generation: Generation
    seed: int
    stop: tuple[str, ...] = ()
    """The response ends before the first of these strings."""


@dataclass(frozen=True)
class Piece:
    """What came since the piece before; the last one says why the response ended."""

    text: str
    num_tokens: int
    finish: Literal["stop", "length"] | None = None


def stream_response(
    model: Any,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    sampling: Sampling,
    ends: Collection[int],
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Piece]:
    """The response to the prompt `ids`, piece by piece; tokens in `ends` end it.

    No piece has a finish when it was cancelled.
    """
    text, scanner = Detokenizer(tokenizer), StopScanner(sampling.stop)
    waiting = 0
    for token in sample_tokens(model, ids, sampling.generation, sampling.seed):
        if cancelled():
            return
        waiting += 1
        if token in ends:
            yield Piece(scanner.push(text.flush()) + scanner.flush(), waiting, "stop")
            return
        shown = scanner.push(text.push(token))
        if scanner.stopped:
            yield Piece(shown, waiting, "stop")
            return
        if shown:
            yield Piece(shown, waiting)
            waiting = 0
    rest = scanner.push(text.flush()) + scanner.flush()
    yield Piece(rest, waiting, "stop" if scanner.stopped else "length")


def sample_tokens(model: Any, ids: Sequence[int], generation: Generation, seed: int) -> Iterator[int]:
    """Token after token, `generation.max_new_tokens` of them; the caller knows where to stop."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    window, cache = torch.tensor([list(ids)], device=device), None
    for _ in range(generation.max_new_tokens):
        with torch.no_grad():  # left before yielding: grad mode belongs to the thread, not to this generator
            output = model(input_ids=window, past_key_values=cache, use_cache=True, logits_to_keep=1)
            draw = torch.rand(1, generator=generator).to(device)
            window = pick(output.logits[:, -1], draw, generation)[0][:, None]  # (1, 1)
        cache = output.past_key_values
        yield int(window)


class Detokenizer:
    """Text from tokens one at a time; the texts together are the text of all tokens.

    A token is decoded together with those of the piece before, because decoders treat the first token of a
    text differently (a leading space).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before = 0  # ids from here to _shown are the piece before
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that the token completes; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._before, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """What was held back, without a character that stayed incomplete."""
        text = self._new_text().rstrip(INCOMPLETE)
        self._before = self._shown = len(self._ids)
        return text

    def _new_text(self) -> str:
        known = self._decode(self._ids[self._before : self._shown])
        return self._decode(self._ids[self._before :])[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        # cleaning up would change text that was shown already
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


class StopScanner:
    """Lets text through up to the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that no stop string can begin in any more; nothing after one was found."""
        if self.stopped:
            return ""
        self._held += text
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        begun = (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        keep = len(self._held) - max(begun, default=0)
        shown, self._held = self._held[:keep], self._held[keep:]
        return shown

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.stopped else self._held
