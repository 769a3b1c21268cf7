"""What the server answers: the objects of OpenAI's interface, whole or as the chunks of a stream."""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.serving.model import ServedModel

DONE = "data: [DONE]\n\n"


@dataclass
class Choice:
    """One response as it grows."""

    text: str = ""
    num_tokens: int = 0
    finish: str | None = None


def usage(prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, int]:
    """The token counts; the token that ends a response is counted too."""
    completion_tokens = sum(choice.num_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def event(value: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


@dataclass(frozen=True)
class TextReply:
    """The answers to POST /v1/completions."""

    model: ServedModel
    prefix: str = "cmpl"
    whole_object: str = "text_completion"
    chunk_object: str = "text_completion"
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: uuid.uuid4().hex)

    def whole(self, choices: Sequence[Choice], counts: Mapping[str, int]) -> dict[str, Any]:
        """The answer that is no stream."""
        shaped = [self.choice(index, choice) for index, choice in enumerate(choices)]
        return {**self._head(self.whole_object), "choices": shaped, "usage": counts}

    def chunk(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """A chunk of a stream."""
        return {**self._head(self.chunk_object), "choices": choices, **more}

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """A whole response."""
        return {"index": index, "text": choice.text, "logprobs": None, "finish_reason": choice.finish}

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says before a response's first text, if anything."""
        return None

    def delta(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """The next text of a response."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self.number}",
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.version,
        }


@dataclass(frozen=True)
class ChatReply(TextReply):
    """The answers to POST /v1/chat/completions."""

    prefix: str = "chatcmpl"
    whole_object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """A whole response."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": choice.finish}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Who speaks."""
        return self._delta(index, {"role": "assistant", "content": ""}, None)

    def delta(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """The next text of a response."""
        return self._delta(index, {"content": text} if text else {}, finish)

    def _delta(self, index: int, delta: Mapping[str, str], finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
