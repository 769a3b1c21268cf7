"""A conversation with a served model in the terminal."""

import json
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx

from components.errors import InputError

COMMANDS = "/reset starts over, /regenerate answers the last message again, /quit (or Ctrl-D) leaves"
LOCAL = ("127.0.0.1", "localhost", "::1")
CONNECT_S = 5.0


class ServerError(Exception):
    """The server refused a message or broke off; the conversation can go on."""


class Server:
    """A server with OpenAI's interface."""

    def __init__(self, url: str) -> None:
        """Find the server. Raises InputError when the address is none or nobody answers there as expected."""
        address = urlsplit(url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise InputError(f"--url is {url!r}; accepted: an address such as http://127.0.0.1:8000.")
        self.url = url.rstrip("/").removesuffix("/v1")
        # an answer may wait behind others for as long as it takes; a proxy has no business on this machine
        timeout = httpx.Timeout(None, connect=CONNECT_S)
        self._client = httpx.Client(timeout=timeout, trust_env=address.hostname not in LOCAL)
        try:
            self.model = str(self._client.get(f"{self.url}/v1/models").json()["data"][0]["id"])
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise InputError(f"no server at {self.url} ({error}). Start one with `plumbline serve`.") from None
        except (ValueError, LookupError, TypeError):
            raise InputError(f"{self.url} answers, but not as a model server does. Check --url.") from None

    def stream(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """The answer, piece by piece. Raises ServerError when the server refuses or breaks off."""
        body = {"model": self.model, "messages": messages, "stream": True}
        try:
            with self._client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
                if response.is_error:
                    raise ServerError(_message(response.read()))
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield _text(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            raise ServerError(f"the server at {self.url} is gone ({error})") from None


class Conversation:
    """The messages so far, and what the person's lines do to them."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._messages: list[dict[str, str]] = []

    def handle(self, line: str) -> bool:
        """Act on one line that was typed; returns whether the conversation goes on."""
        match line.strip():
            case "":
                pass
            case "/quit" | "/exit":
                return False
            case "/reset":
                self._messages.clear()
                print("(started over)")
            case "/regenerate":
                self._regenerate()
            case command if command.startswith("/"):
                print(f"({command.split()[0]} is no command: {COMMANDS})")
            case text:
                self._messages.append({"role": "user", "content": text})
                self._answer()
        return True

    def _regenerate(self) -> None:
        """Answer the last message again."""
        if self._messages and self._messages[-1]["role"] == "assistant":
            self._messages.pop()
        if self._messages:
            self._answer()
        else:
            print("(nothing to answer yet)")

    def _answer(self) -> None:
        """Show the answer as it comes. What Ctrl-C cuts off stays; a refused message is forgotten."""
        parts = []
        print(f"{self._server.model}> ", end="", flush=True)
        try:
            for text in self._server.stream(self._messages):
                parts.append(text)
                print(_printable(text), end="", flush=True)
            print()
        except KeyboardInterrupt:
            print(" (stopped)")
        except ServerError as error:
            print(f"\nerror: {error}", file=sys.stderr)
            self._messages.pop()
            return
        self._messages.append({"role": "assistant", "content": "".join(parts)})


def chat(url: str = "http://127.0.0.1:8000") -> None:
    """Talk to the model that is served at the address until the person leaves.

    Raises InputError when there is no server.
    """
    import contextlib

    server = Server(url)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() line editing and a history
    print(f"{server.model} at {server.url}. {COMMANDS}; Ctrl-C stops an answer.")
    conversation = Conversation(server)
    while True:
        try:
            if not conversation.handle(input("you> ")):
                return
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")


def _text(chunk: dict[str, Any]) -> str:
    """The text in a chunk of the stream. Raises ServerError when it is an error."""
    if "error" in chunk:
        raise ServerError(chunk["error"]["message"])
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


def _message(body: bytes) -> str:
    """The message of an error, or what was answered instead."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body.decode(errors="replace")[:200]


def _printable(text: str) -> str:
    """The text without control characters, with which an answer could steer the terminal."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")
