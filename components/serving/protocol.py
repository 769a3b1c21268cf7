"""The requests of OpenAI's interface, as far as a model of text can answer them, and its errors.

What would change the answer and is not offered here is refused, never ignored; what only describes the
request (`user`, `metadata`) is accepted and left alone.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from components.records import Conversation, Message
from components.settings import Generation

MAX_CHOICES = 16
MAX_PROMPTS = 64
NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "web_search_options": (None,),
}
"""Fields that are not offered, with the values that ask for nothing."""
LEFT_ALONE = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store",
    "user",
}  # fmt: skip


class ApiError(Exception):
    """A refusal in the form that clients of the interface understand."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Body(BaseModel):
    """A part of a request: unknown fields are refused, types are not bent, a null is a field left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool = False
    include_obfuscation: bool = False


Stop = Annotated[str, Field(min_length=1)]


class CompletionBody(Body):
    """What both kinds of request have."""

    model: str
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0)
    """As vLLM has it; 0 keeps all."""
    max_tokens: int | None = Field(None, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_offered(cls, values: Any) -> Any:
        """The fields without those that ask for nothing."""
        if not isinstance(values, dict):
            return values
        for field, neutral in NOT_OFFERED.items():
            if field in values and values[field] not in neutral:
                raise ApiError(400, f"'{field}' is not offered by this server; leave it out.", field, "unsupported")
        dropped = NOT_OFFERED.keys() | LEFT_ALONE
        return {name: value for name, value in values.items() if name not in dropped}

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "'stream_options' needs 'stream' to be true.", "stream_options")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wanted_tokens(self) -> int | None:
        """Tokens at most; None for as many as fit."""
        return self.max_tokens

    def generation(self, room: int) -> Generation:
        """How to sample, within the `room` that the prompt leaves in the model's context."""
        return Generation(
            max_new_tokens=min(self.wanted_tokens or room, room),
            temperature=self.temperature,
            top_p=max(self.top_p, 1e-6),  # 0 means the likeliest token, which is always kept
            top_k=self.top_k,
        )


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def message(self) -> Message:
        """The turn as the chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class ChatBody(CompletionBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def wanted_tokens(self) -> int | None:
        """Tokens at most, by the newer name or the older."""
        return self.max_completion_tokens or self.max_tokens

    def conversation(self) -> Conversation:
        """The messages as a prompt."""
        return tuple(message.message() for message in self.messages)


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class TextBody(CompletionBody):
    """POST /v1/completions."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: int | None = Field(16, ge=1)
    """16 is the interface's own default."""

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)
