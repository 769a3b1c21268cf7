"""A run's end reaches a webhook that runs here: tried again while it is in trouble, never shown with its secret."""

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from components import webhook

MESSAGE = {"run": "r-1", "status": "failed", "error": "rl: the loss is no number", "pipeline": "hh"}
SECRET = "s3cr3t"


class Hook:
    """Answers each request with the next of `answers`, then with 200."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        self.bodies: list[Any] = []
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hook.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                content = f"no {self.path}".encode()  # as servers do that show what they were asked
                self.send_response(hook.answers.pop(0) if hook.answers else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_port}/services/{SECRET}?key={SECRET}"


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    hook = Hook()
    monkeypatch.setenv(webhook.VARIABLE, hook.address)
    monkeypatch.setattr(webhook, "BACKOFF_S", 0.01)
    yield hook
    hook.http.shutdown()
    hook.http.server_close()


def test_a_message_arrives_as_json(hook: Hook) -> None:
    assert webhook.send(MESSAGE) == ""
    assert hook.bodies == [MESSAGE]


def test_without_an_address_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(webhook.VARIABLE, " ")
    monkeypatch.setattr(webhook.httpx, "post", lambda *_, **__: pytest.fail("something was sent"))
    assert webhook.send(MESSAGE) == ""


@pytest.mark.parametrize("trouble", [500, 503, 429])
def test_a_server_in_trouble_is_asked_again(hook: Hook, trouble: int) -> None:
    hook.answers = [trouble, trouble]
    assert webhook.send(MESSAGE) == ""
    assert hook.bodies == [MESSAGE] * 3


def test_after_three_attempts_it_is_left_alone_with_one_sentence_that_holds_no_secret(
    hook: Hook, caplog: pytest.LogCaptureFixture
) -> None:
    hook.answers = [500] * 5
    with caplog.at_level(logging.INFO):  # as Kubeflow's executor sets it
        trouble = webhook.send(MESSAGE)
    assert len(hook.bodies) == 3
    assert trouble.startswith("the webhook at 127.0.0.1 got no word of the run (status 500)")
    assert SECRET not in trouble + caplog.text


@pytest.mark.parametrize("answer", [301, 404])
def test_an_answer_that_stays_the_same_is_final(hook: Hook, answer: int) -> None:
    hook.answers = [answer]
    assert f"(status {answer})" in webhook.send(MESSAGE)
    assert len(hook.bodies) == 1


def test_a_server_that_is_not_there_is_told_of_by_its_host(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    hook.http.server_close()
    assert "127.0.0.1 got no word of the run (ConnectError)" in webhook.send(MESSAGE)


@pytest.mark.parametrize("address", ["s3cr3t", "ftp://host/s3cr3t", "https:///s3cr3t", "http://[s3cr3t", "http://h:x"])
def test_what_is_no_web_address_is_said_without_showing_it(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(webhook.VARIABLE, address)
    trouble = webhook.send(MESSAGE)
    assert trouble.startswith("PLUMBLINE_WEBHOOK is no web address") and SECRET not in trouble
