"""The server as its clients meet it: a real one on a free port, the openai package, raw HTTP and the terminal."""

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn

from components.artifacts import write_manifest
from components.base.architecture import train_tokenizer, untrained_llama
from components.errors import InputError
from components.models import policy_card, save_model
from components.serving import watcher as watching
from components.serving.app import create_app, listen, serve
from components.serving.chat import Conversation, Server, chat
from components.serving.folder import Pointer, publish, rollback
from components.serving.model import Stage, load_folder
from components.serving.watcher import Watcher
from components.serving.worker import Worker

CONTEXT = 96
MESSAGES: Any = [{"role": "user", "content": "what colour has the sky?"}]


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two published versions of a tiny model."""
    folder = tmp_path_factory.mktemp("versions")
    tokenizer = train_tokenizer(["what colour has the sky?", "the sky is blue"], 300)
    for seed in (0, 1):
        torch.manual_seed(seed)
        card = policy_card("", "rl", tokenizer)
        model = untrained_llama("1m", tokenizer, CONTEXT)
        with torch.no_grad():  # an end that is never the likeliest: greedy responses reach their limit
            model.model.embed_tokens.weight[tokenizer.eos_token_id].zero_()
        save_model(model, tokenizer, folder / str(seed), card, settings={}, parents={})
    return [folder / "0", folder / "1"]


@dataclass
class Running:
    """A server, the folder it watches, and what is on its stage."""

    url: str
    folder: Path
    stage: Stage
    first: Pointer

    def health(self) -> dict[str, str]:
        answer: dict[str, str] = httpx.get(f"{self.url}/healthz").json()
        return answer

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body)


@contextmanager
def started(folder: Path) -> Iterator[tuple[str, Stage]]:
    listener = listen("127.0.0.1", 0)
    stage = Stage(load_folder(folder))
    server = uvicorn.Server(uvicorn.Config(create_app(stage, Watcher(folder, stage)), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", stage
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def running(versions: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("serving")
    first = publish(versions[0], "tiny", folder)
    with started(folder) as (url, stage):
        yield Running(url, folder, stage, first)


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_health_and_models_report_what_is_deployed(running: Running, client: openai.OpenAI) -> None:
    assert running.health() == {
        "status": "ok",
        "model": "tiny",
        "version": running.first.version,
        "digest": running.first.digest,
    }
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "plumbline"


def test_a_chat_answer_has_the_counts_and_the_reason_it_ended(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=7, n=2, seed=5)
    assert answer.object == "chat.completion" and [c.index for c in answer.choices] == [0, 1]
    assert {choice.message.role for choice in answer.choices} == {"assistant"}
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage and answer.usage.completion_tokens == 14
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 14
    again = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=7, seed=5)
    assert again.choices[0].message.content == answer.choices[0].message.content
    assert answer.choices[1].message.content != answer.choices[0].message.content


def test_a_stream_has_the_same_text_as_the_whole_answer(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30, "seed": 5, "n": 2}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 6
    assert chunks[0].choices[0].delta.role == "assistant"
    for index in (0, 1):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == whole.choices[index].message.content
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_on_the_wire_is_events_that_end_with_done(running: Running) -> None:
    response = running.post("/v1/chat/completions", model="tiny", messages=MESSAGES, max_tokens=3, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert done == "data: [DONE]" and rest == ""
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events)


def test_a_response_ends_before_a_stop_string(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": "the sky", "max_tokens": 40, "seed": 11}
    text = client.completions.create(**asked).choices[0].text
    stop = text[5:8]
    ended = client.completions.create(**asked, stop=[stop, "never there"]).choices[0]
    assert ended.text == text[: text.find(stop)] and ended.finish_reason == "stop"
    streamed = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == ended.text


def test_completions_take_several_prompts_as_text_or_tokens(client: openai.OpenAI, running: Running) -> None:
    asked: Any = {"model": "tiny", "temperature": 0, "max_tokens": 5}
    ids = running.stage.current.tokenizer("the sky")["input_ids"]
    both = client.completions.create(prompt=["the sky", "blue"], n=2, **asked)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text != both.choices[2].text
    for prompt in (ids, [ids]):
        assert client.completions.create(prompt=prompt, **asked).choices[0].text == both.choices[0].text
    default = client.completions.create(model="tiny", prompt="the sky", temperature=0)
    assert default.usage and default.usage.completion_tokens == 16


def test_without_a_limit_an_answer_fills_the_context(client: openai.OpenAI) -> None:
    for limit in ({}, {"max_tokens": 100_000}):
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, **limit)
        assert answer.usage.total_tokens == CONTEXT


def test_system_and_part_messages_reach_the_template(running: Running, client: openai.OpenAI) -> None:
    def tokens(*messages: Any) -> int:
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
        assert answer.usage
        return answer.usage.prompt_tokens

    parts = {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "sky"}]}
    alone = tokens({"role": "user", "content": "the sky"})
    assert tokens(parts) == alone < tokens({"role": "developer", "content": "be brief"}, parts)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "the sky " * 99}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_a_wrong_field_is_refused_with_its_name(running: Running, change: Any, param: str) -> None:
    response = running.post("/v1/chat/completions", **{"model": "tiny", "messages": MESSAGES, **change})
    error = response.json()["error"]
    assert response.status_code == 400 and set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"] == param and param in error["message"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"messages": [{"role": "user", "content": 7}]},
            "'messages.0.content': Input should be a valid string; it is 7.",
        ),
        ({"messages": [{"role": "user"}]}, "'messages.0.content': Field required."),
        ({"messages": [{"role": "user", "content": "a", "tone": 1}]}, "unknown field 'messages.0.tone'."),
        ({"model": None}, "'model': Field required."),
    ],
)
def test_a_refusal_says_where_and_what(running: Running, change: Any, message: str) -> None:
    response = running.post("/v1/chat/completions", **{"model": "tiny", "messages": MESSAGES, **change})
    assert response.json()["error"]["message"] == message


def test_fields_that_ask_for_nothing_are_accepted(running: Running) -> None:
    neutral = {"user": "me", "logprobs": False, "tools": [], "frequency_penalty": 0.0, "stop": None, "seed": None}
    response = running.post("/v1/chat/completions", model="tiny", messages=MESSAGES, max_tokens=1, **neutral)
    assert response.status_code == 200


def test_what_is_not_there_is_404_in_the_same_form(running: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    for path, status in (("/v1/embeddings", 404), ("/v1/models/other", 404), ("/v1/chat/completions", 405)):
        response = httpx.get(running.url + path)
        assert response.status_code == status and response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b'{"model": ', "application/json", "the body is not JSON"),
        (b"[]", "application/json", "not a JSON object"),
        (b'{"model": "tiny"}', "text/plain", "not a JSON object"),
        (b'{"model": "tiny", "prompt": ""}', "application/json", "'prompt' is empty"),
        (b'{"model": "tiny", "prompt": [999999]}', "application/json", "'prompt' has a token id above"),
        (b'{"model": "tiny", "prompt": [[]]}', "application/json", "'prompt"),
    ],
)
def test_a_body_that_is_no_request_is_400(running: Running, content: bytes, kind: str, message: str) -> None:
    response = httpx.post(f"{running.url}/v1/completions", content=content, headers={"Content-Type": kind})
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_requests_at_once_get_the_answers_they_get_alone(running: Running) -> None:
    async def ask(seeds: list[int]) -> list[str]:
        async with httpx.AsyncClient(base_url=running.url, timeout=60) as http:
            bodies = [{"model": "tiny", "prompt": "the sky", "seed": s, "max_tokens": 10} for s in seeds]
            answers = await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies))
            return [answer.json()["choices"][0]["text"] for answer in answers]

    together = asyncio.run(ask(list(range(6))))
    assert together == [asyncio.run(ask([seed]))[0] for seed in range(6)]


def leave_a_stream(url: str, body: dict[str, Any]) -> None:
    with httpx.stream("POST", url, json=body | {"stream": True}) as response:
        next(response.iter_lines())


def leave_before_the_answer(url: str, body: dict[str, Any]) -> None:
    with pytest.raises(httpx.TimeoutException):
        httpx.post(url, json=body, timeout=0.3)


@pytest.mark.parametrize("leave", [leave_a_stream, leave_before_the_answer])
def test_a_client_that_leaves_stops_the_decoding(
    running: Running, leave: Callable[[str, dict[str, Any]], None]
) -> None:
    decoded = []

    def slow(*_: Any) -> None:
        decoded.append(1)
        time.sleep(0.03)

    hook = running.stage.current.model.register_forward_hook(slow)
    try:
        leave(f"{running.url}/v1/chat/completions", {"model": "tiny", "messages": MESSAGES, "n": 16})
        time.sleep(0.4)
        seen = len(decoded)
        time.sleep(0.2)
        assert 0 < seen == len(decoded)
    finally:
        hook.remove()


def test_a_job_that_fails_is_an_error_and_the_next_one_runs(running: Running) -> None:
    model = running.stage.current.model

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    hook = model.register_forward_hook(fail)
    asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2}
    try:
        whole = running.post("/v1/chat/completions", **asked)
        streamed = running.post("/v1/chat/completions", **asked, stream=True)
    finally:
        hook.remove()
    assert whole.status_code == 500 and whole.json()["error"]["type"] == "server_error"
    assert '"server_error"' in streamed.text and "out of memory" not in streamed.text + whole.text
    assert running.post("/v1/chat/completions", **asked).status_code == 200


def test_closing_ends_what_is_decoding_and_what_waits() -> None:
    worker = Worker()

    async def gone() -> bool:
        return False

    def endless(cancelled: Callable[[], bool]) -> Iterator[int]:
        while not cancelled():
            yield 1
            time.sleep(0.001)

    async def read() -> list[int]:
        asyncio.get_running_loop().call_later(0.1, worker.close)
        return [item async for item in worker.stream(endless, gone)]

    assert set(asyncio.run(read())) == {1}


def test_a_new_version_replaces_the_old_one_without_dropping_a_request(
    versions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "POLL_S", 0.05)
    first = publish(versions[0], "tiny", tmp_path)
    body: Any = {"model": "tiny", "prompt": "the sky", "temperature": 0, "max_tokens": 60}
    with started(tmp_path) as (url, stage):
        alone = httpx.post(f"{url}/v1/completions", json=body).json()
        stage.current.model.register_forward_hook(lambda *_: time.sleep(0.02))
        texts, fingerprints = [], set()
        with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}) as response:
            for line in response.iter_lines():
                if not texts:
                    second = publish(versions[1], "tiny", tmp_path)
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    texts.append(chunk["choices"][0]["text"])
                    fingerprints.add(chunk["system_fingerprint"])
        assert "".join(texts) == alone["choices"][0]["text"] and fingerprints == {first.version}
        until(lambda: httpx.get(f"{url}/healthz").json()["digest"] == second.digest)
        other = httpx.post(f"{url}/v1/completions", json=body).json()
        assert other["system_fingerprint"] == second.version
        assert other["choices"][0]["text"] != alone["choices"][0]["text"]
        rollback(tmp_path)
        until(lambda: httpx.get(f"{url}/healthz").json()["digest"] == first.digest)


def test_a_corrupt_version_is_refused_once_and_the_old_one_stays(
    versions: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "serving"
    first = publish(versions[0], "tiny", folder)
    stage = Stage(load_folder(folder))
    watcher = Watcher(folder, stage)
    second = publish(versions[1], "tiny", folder)
    weights = folder / second.path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    for _ in range(3):
        watcher.look()
    assert stage.current.digest == first.digest
    assert caplog.text.count("is refused") == 1 and "model.safetensors" in caplog.text
    weights.write_bytes(whole)
    (folder / "current.json").write_bytes((folder / "current.json").read_bytes())
    watcher.look()
    assert stage.current.digest == second.digest
    (folder / "current.json").unlink()
    watcher.look()
    assert stage.current.digest == second.digest


def test_a_plain_model_folder_is_served_under_its_own_name(versions: list[Path], tmp_path: Path) -> None:
    shutil.copytree(versions[0], tmp_path / "mine")
    served = load_folder(tmp_path / "mine")
    digest = write_manifest(tmp_path / "mine", "version", settings={"name": "helper"})
    assert served.name == "mine" and served.digest == digest and served.context == CONTEXT
    assert load_folder(tmp_path / "mine").name == "helper"


def test_a_pointer_that_names_another_digest_is_refused(versions: list[Path], tmp_path: Path) -> None:
    pointer = publish(versions[0], "tiny", tmp_path)
    write_manifest(tmp_path / pointer.path, "version")
    text = json.dumps({**vars(replace(pointer, digest="f" * 64))})
    (tmp_path / "current.json").write_text(text)
    with pytest.raises(InputError, match=r"says f{64}. Deploy again"):
        load_folder(tmp_path)


def test_serving_says_what_is_missing_or_taken(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        serve(tmp_path / "nowhere", "127.0.0.1", 0)
    with pytest.raises(InputError, match=r"nothing is deployed there yet \(no current\.json\)"):
        serve(tmp_path, "127.0.0.1", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}: Address already in use"):
            serve(tmp_path, "127.0.0.1", port)
    with pytest.raises(InputError, match=r"cannot listen on 192\.0\.2\.1"):
        serve(tmp_path, "192.0.2.1", 0)


def test_a_terminal_conversation(
    running: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[list[dict[str, str]]] = []
    original = Server.stream

    def spy(self: Server, messages: list[dict[str, str]]) -> Iterator[str]:
        sent.append([dict(message) for message in messages])
        if len(messages) > 2:
            raise KeyboardInterrupt  # as if Ctrl-C were pressed during the second answer
        return original(self, messages)

    lines = iter(["/regenerate", "sky?", "/regenerate", "", "again?", "/what", "/reset", "blue?", "the sky " * 99])

    def typed(prompt: str) -> str:
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(Server, "stream", spy)
    chat(running.url + "/v1/")
    roles = [[message["role"] for message in messages] for messages in sent]
    assert roles == [["user"], ["user"], ["user", "assistant", "user"], ["user"], ["user", "assistant", "user"]]
    assert sent[0] == sent[1] and sent[3][0]["content"] == "blue?"
    out = capsys.readouterr().out
    assert "(nothing to answer yet)" in out and "(/what is no command" in out and "(stopped)" in out


def test_a_refused_message_is_reported_and_forgotten(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(Server(running.url))
    assert conversation.handle("the sky " * 99)
    assert "error: 'messages' has" in capsys.readouterr().err
    assert conversation.handle("/regenerate")
    assert "(nothing to answer yet)" in capsys.readouterr().out
    assert not conversation.handle(" /quit ")


def test_a_terminal_gets_no_control_characters(
    running: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Server, "stream", lambda self, messages: iter(["\x1b[2Jred\x07", "\n", "木🙂"]))
    Conversation(Server(running.url)).handle("hello")
    assert capsys.readouterr().out == "tiny> [2Jred\n木🙂\n"


def test_no_server_is_one_message(running: Running) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(InputError, match=r"no server at .*Start one with `plumbline serve`"):
        chat(f"http://127.0.0.1:{port}")
    with pytest.raises(InputError, match="--url is 'here'; accepted: an address"):
        chat("here")
    with pytest.raises(InputError, match="not as a model server does"):
        Server(f"{running.url}/healthz")
