"""An HTTP proxy that does harm by a plan: busy answers, lost requests and answers, bodies cut, damaged or slow.

What happens to a request depends on the seed, the request and how often it was made before, and on nothing else: not on
which of several threads comes first.
"""

import http.client
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = ("429", "500", "503", "lost", "unanswered", "half sent", "cut", "short", "slow", "damaged")
"""busy three ways; the request lost; done but not answered; broken off while it was sent; the answer broken off, ended
early as if it were whole, in drops, with a byte changed."""
Plan = Callable[[str, int], str | None]
"""The fault for a request (method, path, range) that was made so many times before; None lets it pass."""


def seeded(seed: int, faults: Sequence[str] = FAULTS, share: float = 0.4) -> Plan:
    """A share of all requests suffers one of the faults, by the seed."""

    def plan(request: str, before: int) -> str | None:
        chance = random.Random(f"{seed} {request} {before}")
        return chance.choice(faults) if chance.random() < share else None

    return plan


def first_time(fault: str) -> Plan:
    """Every request suffers the fault once."""
    return lambda request, before: fault if before == 0 else None


class FaultProxy:
    """A proxy in front of a server, in threads of this process."""

    def __init__(self, upstream: str, plan: Plan) -> None:
        self.upstream, self.plan = urlsplit(upstream).netloc, plan
        self.suffered: Counter[str] = Counter()
        """How often each fault happened."""
        self._before: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = _Server(self)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, request: str) -> str | None:
        with self._lock:
            before = self._before[request]
            self._before[request] += 1
        fault = self.plan(request, before)  # which may take its time
        if fault:
            with self._lock:
                self.suffered[fault] += 1
        return fault


class Broken(Exception):
    """The connection ends here."""


class _Server(ThreadingHTTPServer):
    """Requests in threads; a connection that breaks is nothing to report."""

    daemon_threads = True

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    @property
    def proxy(self) -> FaultProxy:
        return self.server.proxy

    def log_message(self, *_: object) -> None:
        pass

    def _pass(self) -> None:
        place = urlsplit(self.path)
        detail = self.headers.get("Range") or self.headers.get("Content-Range") or place.query
        fault = self.proxy.fault(f"{self.command} {place.path} {detail}")
        try:
            self._suffer(fault)
        except (Broken, ConnectionError, http.client.HTTPException):
            self.close_connection = True

    def _suffer(self, fault: str | None) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        media = self.command == "GET" and "alt=media" in self.path
        if fault == "lost":
            raise Broken
        body = self.rfile.read(length)
        if fault in ("429", "500", "503"):
            self._reply(int(fault), {}, b"")
            return
        if fault == "half sent" and length > 1:
            self._half(body)
            raise Broken
        if fault == "damaged" and self.command in ("PUT", "POST") and length > 2000:
            body = _damaged(body)
        status, headers, answer = self._ask(body)
        if fault == "unanswered":
            raise Broken
        if fault == "damaged" and media:
            answer = _damaged(answer)
        if fault == "short" and media:
            answer = answer[: len(answer) // 2]
        self._reply(status, headers, answer, fault)

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """The answer of the server behind."""
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=10)
        try:
            upstream.request(self.command, self.path, body, dict(self.headers))
            found = upstream.getresponse()
            kept = {k: v for k, v in found.getheaders() if k.lower() not in ("content-length", "connection")}
            return found.status, kept, found.read()
        finally:
            upstream.close()

    def _half(self, body: bytes) -> None:
        """Send the server behind the first half of a body, and no more."""
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=10)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            upstream.putheader(name, value)
        upstream.endheaders(body[: len(body) // 2])
        upstream.sock.shutdown(socket.SHUT_WR)
        while upstream.sock.recv(1000):  # until the server behind has given it up
            pass
        upstream.close()

    def _reply(self, status: int, headers: dict[str, str], body: bytes, fault: str | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("server", "date"):
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            raise Broken
        if fault == "slow":
            for at in range(0, len(body), max(1, len(body) // 4)):
                self.wfile.write(body[at : at + max(1, len(body) // 4)])
                self.wfile.flush()
                time.sleep(0.01)
            return
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = _pass  # noqa: N815


def _damaged(body: bytes) -> bytes:
    """The body with one byte changed, near its end."""
    if not body:
        return body
    at = len(body) * 3 // 4
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
