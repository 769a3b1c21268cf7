"""From a checked request to its answer: prompts as tokens, the decoding, the whole or streamed reply."""

import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from components.serving.model import ServedModel
from components.serving.protocol import ApiError, ChatBody, CompletionBody, TextBody
from components.serving.replies import DONE, ChatReply, Choice, TextReply, event, usage
from components.serving.stream import Piece, Sampling, stream_response
from components.serving.worker import Cancelled, Worker
from components.tokens import encode_prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """What one request asks of the model: `n` responses to each prompt, prompt-major."""

    served: ServedModel
    prompts: Sequence[Sequence[int]]
    body: CompletionBody

    @property
    def num_choices(self) -> int:
        """Responses in all."""
        return len(self.prompts) * self.body.n

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    def job(self, seed: int) -> Callable[[Cancelled], Iterator[tuple[int, Piece]]]:
        """The decoding of one response after another, each piece with its response's index."""

        def pieces(cancelled: Cancelled) -> Iterator[tuple[int, Piece]]:
            served = self.served
            for index in range(self.num_choices):
                if cancelled():
                    return
                ids = self.prompts[index // self.body.n]
                generation = self.body.generation(served.context - len(ids))
                # the first response of a seed is the same whatever n is
                sampling = Sampling(generation, (seed + index) % 2**63, self.body.stops)
                for piece in stream_response(served.model, served.tokenizer, ids, sampling, served.ends, cancelled):
                    yield index, piece

        return pieces


def chat_order(served: ServedModel, body: ChatBody) -> Order:
    """The order behind a conversation. Raises ApiError when it does not fit the template or the context."""
    from jinja2 import TemplateError

    try:
        ids = encode_prompt(served.tokenizer, body.conversation())
    except TemplateError as error:
        raise ApiError(400, f"the model's chat template refuses these messages: {error}", "messages") from None
    return Order(served, [_fitting(served, ids, "messages")], body)


def text_order(served: ServedModel, body: TextBody) -> Order:
    """The order behind one or several raw prompts. Raises ApiError for one that is empty or too long."""
    prompts = []
    for prompt in body.prompts:
        ids = list(served.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt
        size = served.model.get_input_embeddings().num_embeddings
        if any(token >= size for token in ids):
            raise ApiError(400, f"'prompt' has a token id above {size - 1}, the model's last.", "prompt")
        prompts.append(_fitting(served, ids, "prompt"))
    return Order(served, prompts, body)


async def answer(order: Order, worker: Worker, request: Request) -> Response:
    """The reply to the order. Raises ApiError when the server closes before it is complete."""
    kind = ChatReply if isinstance(order.body, ChatBody) else TextReply
    reply = kind(order.served)
    seed = secrets.randbits(62) if order.body.seed is None else order.body.seed
    pieces = worker.stream(order.job(seed), request.is_disconnected)
    if order.body.stream:
        return StreamingResponse(_events(order, reply, pieces), media_type="text/event-stream")
    choices = [Choice() for _ in range(order.num_choices)]
    async for index, piece in pieces:
        _add(choices[index], piece)
    _complete(choices)
    return JSONResponse(reply.whole(choices, usage(order.prompt_tokens, choices)))


async def _events(order: Order, reply: TextReply, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[str]:
    """The events of a stream; what goes wrong on the way is its last one."""
    more: dict[str, Any] = {"usage": None} if order.body.include_usage else {}
    choices = [Choice() for _ in range(order.num_choices)]
    try:
        async for index, piece in pieces:
            if choices[index] == Choice() and (opening := reply.opening(index)):
                yield event(reply.chunk([opening], **more))
            _add(choices[index], piece)
            if piece.text:
                yield event(reply.chunk([reply.delta(index, piece.text, None)], **more))
            if piece.finish:
                yield event(reply.chunk([reply.delta(index, "", piece.finish)], **more))
        _complete(choices)
    except ApiError as error:
        yield event(error.body)
        return
    except Exception:
        logger.exception("a stream failed")
        yield event(ApiError(500, "the server failed while answering; its log says why.").body)
        return
    if order.body.include_usage:
        yield event(reply.chunk([], usage=usage(order.prompt_tokens, choices)))
    yield DONE


def _fitting(served: ServedModel, ids: list[int], param: str) -> list[int]:
    """The prompt itself. Raises ApiError when it is empty or leaves no room for a response."""
    if not ids:
        raise ApiError(400, f"'{param}' is empty.", param)
    if len(ids) >= served.context:
        raise ApiError(
            400,
            f"'{param}' has {len(ids)} tokens; the model holds {served.context} with the response.",
            param,
            "context_length_exceeded",
        )
    return ids


def _add(choice: Choice, piece: Piece) -> None:
    choice.text += piece.text
    choice.num_tokens += piece.num_tokens
    choice.finish = piece.finish


def _complete(choices: Sequence[Choice]) -> None:
    """Raise ApiError when a response was broken off."""
    if any(choice.finish is None for choice in choices):
        raise ApiError(503, "the server is closing; ask again.")
