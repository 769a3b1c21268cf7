"""The server: OpenAI's interface over HTTP for the model that is deployed."""

import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from components.errors import InputError
from components.serving.answers import answer, chat_order, text_order
from components.serving.folder import POINTER, WATCHED
from components.serving.model import ServedModel, Stage, load_folder
from components.serving.protocol import ApiError, ChatBody, TextBody
from components.serving.watcher import Watcher
from components.serving.worker import Worker
from components.storage import refuse_remote

logger = logging.getLogger(__name__)

GRACE_S = 5  # for requests in flight when the server is stopped


def serve(folder: str | Path, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Answer requests until interrupted, with what the serving folder points at now and later.

    A plain model folder is served too. Raises InputError when nothing is deployed there, its files were
    altered, or the address is taken.
    """
    import uvicorn

    folder = refuse_remote(str(folder), "--dir", WATCHED)
    listener = listen(host, port)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("components").setLevel(logging.INFO)
    with listener:
        stage = Stage(load_folder(folder))
        watcher = Watcher(folder, stage) if (folder / POINTER).exists() else None
        model, address = stage.current, f"[{host}]" if ":" in host else host
        address += f":{listener.getsockname()[1]}"
        print(
            f"serving {model.name} {model.version} at http://{address}  (Ctrl-C stops)",
            flush=True,
        )
        config = uvicorn.Config(create_app(stage, watcher), timeout_graceful_shutdown=GRACE_S)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            logger.info("stopped")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError when the address is taken, not allowed or not this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot listen on {host}, port {port}: {reason}. Choose another with --host or --port."
        ) from None


def create_app(stage: Stage, watcher: Watcher | None = None) -> FastAPI:
    """The application: requests get the model on stage; `watcher` runs as long as it does."""
    worker = Worker()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if watcher:
            watcher.start()
        yield
        if watcher:
            watcher.stop()
        worker.close()

    app = FastAPI(title="plumbline", lifespan=lifespan)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _not_there)
    app.add_exception_handler(Exception, _failed)

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        model = stage.current
        return {"status": "ok", "model": model.name, "version": model.version, "digest": model.digest}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(stage.current)]}

    @app.get("/v1/models/{name}")
    def model(name: str) -> dict[str, Any]:
        return _described(_named(stage, name))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await answer(chat_order(_named(stage, body.model), body), worker, request)

    @app.post("/v1/completions")
    async def completions(body: TextBody, request: Request) -> Response:
        return await answer(text_order(_named(stage, body.model), body), worker, request)

    return app


def _named(stage: Stage, name: str) -> ServedModel:
    """The model on stage. Raises ApiError when a request names another."""
    model = stage.current
    if name != model.name:
        raise ApiError(404, f"the model '{name}' is not served here; '{model.name}' is.", "model", "model_not_found")
    return model


def _described(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "plumbline",
        "version": model.version,
        "digest": model.digest,
        "max_model_len": model.context,
    }


def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status)


def _invalid(request: Request, error: Exception) -> JSONResponse:
    """A body that is no JSON or does not fit: the first thing that is wrong with it, and where."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = _place(first["loc"][1:], error.body, first["type"])
    if first["type"] == "json_invalid":
        return _refused(request, ApiError(400, f"the body is not JSON: {first['ctx']['error']}."))
    if not place:
        return _refused(request, ApiError(400, "the body is not a JSON object with Content-Type application/json."))
    param = place[0]
    if first["type"] == "extra_forbidden":
        return _refused(request, ApiError(400, f"unknown field '{'.'.join(place)}'.", param, "unknown_parameter"))
    seen = "" if first["type"] == "missing" else f"; it is {_short(first['input'])}"
    return _refused(request, ApiError(400, f"'{'.'.join(place)}': {first['msg']}{seen}.", param))


def _place(location: Sequence[int | str], body: Any, kind: str) -> list[str]:
    """The keys that lead to what is wrong, without the names of types that pydantic puts between them."""
    place: list[str] = []
    for part in location:
        reached = part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int)
        if not reached:
            return [*place, str(part)] if kind == "missing" else place
        place.append(str(part))
        body = body[part]
    return place


def _not_there(request: Request, error: Exception) -> JSONResponse:
    """An address or a method that is not offered."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}."
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)


def _failed(request: Request, error: Exception) -> JSONResponse:
    """Anything else; uvicorn logs the traceback."""
    return _refused(request, ApiError(500, "the server failed while answering; its log says why."))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
