"""Scores from a URL, against a server that runs here: batches, retries, time-outs, and no secret in a message."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
import torch

from components import endpoint
from components.endpoint import retry_after_s, shown_address
from components.errors import InputError
from components.generation import Response
from components.records import Message
from components.scoring.remote import RemoteScorer
from components.settings import UrlScorerSettings

PROMPTS = [(Message("system", "be kind"), Message("user", f"say {number} 🙂")) for number in range(5)]
RESPONSES = [Response("x" * number, (), number % 2 == 0) for number in range(5)]
SECRET = "s3cr3t-t0ken"


class Server:
    """Answers each request with the next of `answers` (status, body, headers), then with the responses' lengths."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any, dict[str, str]]] = []
        self.requests: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.delay_s = 0.0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((body, dict(self.headers)))
                time.sleep(server.delay_s)
                lengths = {"scores": [len(response) for response in body["responses"]]}
                status, answer, headers = server.answers.pop(0) if server.answers else (200, lengths, {})
                if status == 0:  # hang up
                    self.close_connection = True
                    return
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hung up
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "127.0.0.1")
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.http.shutdown()
    made.http.server_close()
    thread.join()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds slept between attempts, which pass at once."""
    slept: list[float] = []
    monkeypatch.setattr(endpoint, "time", type("Clock", (), {"sleep": staticmethod(slept.append)}))
    return slept


@pytest.fixture
def scorer(server: Server) -> Callable[..., RemoteScorer]:
    return lambda **fields: RemoteScorer(UrlScorerSettings(**({"url": server.url, "retries": 2} | fields)), "reward")


def refusal(scorer: RemoteScorer) -> str:
    with pytest.raises(InputError) as raised:
        scorer.score(PROMPTS, RESPONSES)
    return str(raised.value)


def test_batches_are_posted_and_scores_come_in_order(scorer: Any, server: Server) -> None:
    made = scorer(batch_size=2)
    scores = made.score(PROMPTS, RESPONSES)
    assert scores.tolist() == [0, 1, 2, 3, 4] and scores.dtype == torch.float32 and made.metrics == {}
    bodies = [body for body, _ in server.requests]
    assert [len(body["prompts"]) for body in bodies] == [2, 2, 1]
    system, user = {"role": "system", "content": "be kind"}, {"role": "user", "content": "say 3 🙂"}
    assert bodies[1]["prompts"][1] == [system, user]
    assert bodies[1] == {"prompts": bodies[1]["prompts"], "responses": ["xx", "xxx"], "ended": [True, False]}
    assert not any("Authorization" in headers for _, headers in server.requests)


def test_no_responses_ask_nothing(scorer: Any, server: Server) -> None:
    assert scorer().score([], []).shape == (0,)
    assert not server.requests


@pytest.mark.parametrize("status", [429, 500, 502, 503, 0])
def test_a_server_in_trouble_is_asked_again(
    status: int, scorer: Any, server: Server, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    server.answers = [(status, b"busy", {})] * 2
    with caplog.at_level(logging.WARNING):
        assert scorer(backoff_s=0.5).score(PROMPTS, RESPONSES).tolist() == [0, 1, 2, 3, 4]
    assert len(server.requests) == 3 and waits == [0.5, 1.0]
    assert server.requests[0][0] == server.requests[2][0]
    assert caplog.text.count("attempt") == 2 and "attempt 3 of 3 in 1.0 s" in caplog.text


def test_a_server_that_stays_in_trouble_is_named_with_what_it_said(
    scorer: Any, server: Server, waits: list[float]
) -> None:
    server.answers = [(503, b"model\n  is loading " + b"." * 1000, {})] * 4
    message = refusal(scorer())
    assert message.startswith(f"rl.reward_scorer ({server.url}) failed 3 times; the last time: status 503: 'model is")
    assert 'Expected: a JSON object {"scores": [...]}' in message and len(message) < 600
    assert len(server.requests) == 3 and len(waits) == 2


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422])
def test_a_refusal_is_final(status: int, scorer: Any, server: Server, waits: list[float]) -> None:
    server.answers = [(status, {"detail": "no such model"}, {"Location": "http://127.0.0.1:1/"})]
    message = refusal(scorer())
    assert f"({server.url}) answered status {status}: " in message and "no such model" in message
    assert len(server.requests) == 1 and waits == []


def test_a_server_that_does_not_answer_in_time_is_given_up(scorer: Any, server: Server) -> None:
    server.delay_s = 0.5
    message = refusal(scorer(timeout_s=0.05, retries=1, backoff_s=0))
    assert "failed 2 times" in message and "ReadTimeout" in message
    assert len(server.requests) == 2


def test_a_server_that_is_not_there_is_given_up(scorer: Any, server: Server, waits: list[float]) -> None:
    server.http.server_close()
    message = refusal(scorer())
    assert "failed 3 times" in message and "ConnectError" in message and server.url in message


@pytest.mark.parametrize(
    ("stated", "expected"),
    [("7", [7.0, 7.0]), ("1", [2.0, 4.0]), ("100000", [300.0, 300.0]), ("soon", [2.0, 4.0]), ("-5", [2.0, 4.0])],
)
def test_the_wait_is_the_longer_of_ours_and_the_servers(
    stated: str, expected: list[float], scorer: Any, server: Server, waits: list[float]
) -> None:
    server.answers = [(429, b"", {"Retry-After": stated})] * 2
    scorer(backoff_s=2).score(PROMPTS, RESPONSES)
    assert waits == expected


def test_a_wait_may_be_stated_as_a_date() -> None:
    def stated(seconds: int) -> float:
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)
        return retry_after_s(httpx.Response(503, headers={"Retry-After": date}))

    assert stated(60) == pytest.approx(60, abs=3)
    assert stated(-60) == 0
    assert retry_after_s(httpx.Response(503)) == 0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>welcome</html>", "status 200: '<html>welcome</html>'"),
        (b"\xff\xfe", "status 200"),
        (b"", "status 200: ''"),
        ([1, 2, 3, 4, 5], "status 200: '[1, 2, 3, 4, 5]'"),
        ({"score": [1]}, "status 200"),
        ({"scores": 3}, "status 200"),
        ({"scores": [1, 2, 3, 4, None]}, "status 200"),
        ({"scores": [1, 2, 3, 4, True]}, "status 200"),
        ({"scores": [1, 2, 3, 4, "5"]}, "status 200"),
        ({"scores": [1, 2, 3, 4]}, "gave back 4 scores for 5 responses"),
        ({"scores": [1, 2, 3, 4, float("nan")]}, "1 of 5 scores are not finite; the first is nan"),
        ({"scores": [1, 10**400, 3, 4, 5]}, "1 of 5 scores are not finite; the first is inf"),
    ],
)
def test_an_answer_in_another_form_is_refused(body: Any, words: str, scorer: Any, server: Server) -> None:
    server.answers = [(200, body, {})]
    message = refusal(scorer())
    assert message.startswith(f"rl.reward_scorer ({server.url})") and words in message
    assert len(server.requests) == 1


def test_the_token_is_sent_and_shown_to_nobody(
    scorer: Any, server: Server, waits: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SCORER_TOKEN", f"{SECRET}\n")  # as files of secrets often end
    made = scorer(token_env="SCORER_TOKEN", url=f"{server.url}?key={SECRET}")
    server.answers = [(503, f"bad {SECRET}".encode(), {}), (403, f"bad {SECRET}".encode(), {})]
    with caplog.at_level(logging.INFO, logger="components"):
        message = refusal(made)
    assert server.requests[0][1]["Authorization"] == f"Bearer {SECRET}"
    assert f"({server.url}?...) answered status 403: 'bad ***'" in message
    assert SECRET not in message and SECRET not in caplog.text and "bad ***" in caplog.text


@pytest.mark.parametrize(("value", "words"), [(None, "not set or empty"), (" ", "not set"), ("a\nb", "no HTTP header")])
def test_a_token_that_cannot_be_sent_is_told_before_anything_is(
    value: str | None, words: str, scorer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SCORER_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("SCORER_TOKEN", value)
    with pytest.raises(InputError) as raised:
        scorer(token_env="SCORER_TOKEN")
    assert str(raised.value).startswith("rl.reward_scorer.token_env is SCORER_TOKEN") and words in str(raised.value)


def test_an_address_is_shown_without_what_may_be_secret() -> None:
    assert shown_address("https://me:pass@host:8443/a/b?key=1#part") == "https://host:8443/a/b?..."
    assert shown_address("http://host/score") == "http://host/score"
