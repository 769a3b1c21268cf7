"""A stand-in for Cloud Storage's JSON API for objects: uploads, ranges, lists, generations, preconditions.

It keeps what Google documents and the emulator leaves out: `ifGenerationMatch` (412), media of a generation that is
gone (404), sessions that keep whole blocks of 256 KiB of a piece that broke off, and that know when they are complete.
"""

import base64
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

BLOCK_BYTES = 256 << 10
READ_BYTES = 1 << 20


@dataclass
class Entry:
    """An object: its content, or a block that is repeated until its size is reached."""

    generation: int
    content: bytes
    size: int
    crc32c: str
    encoding: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from start to end, in blocks."""
        for at in range(start, end, READ_BYTES):
            stop = min(at + READ_BYTES, end)
            first = at % len(self.content) if self.content else 0
            block = self.content[first : first + stop - at]
            while len(block) < stop - at:
                block += self.content[: stop - at - len(block)]
            yield block


@dataclass
class Session:
    """A resumable upload under way."""

    name: str
    stated: dict[str, Any]
    match: str | None
    received: bytearray = field(default_factory=bytearray)
    count: int = 0
    checksum: int = 0
    done: dict[str, Any] | None = None


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class ObjectStore:
    """One bucket, `bucket`, in memory, and the server in front of it."""

    def __init__(self, keep: bool = True, page: int = 3) -> None:
        """With `keep` false the content of resumable uploads is counted and summed, then dropped."""
        self.keep, self.page = keep, page
        self.entries: dict[str, Entry] = {}
        self.sessions: dict[str, Session] = {}
        self.asked: list[tuple[str, str, str]] = []
        """Method, object name and Range, Content-Range or upload type of every request, in order."""
        self.meanwhile: dict[tuple[str, str], Callable[[], object]] = {}
        """What happens once, before the first request of this method on this object is answered."""
        self.damages = False
        """Whether it takes whatever arrives, with a byte changed, and compares nothing."""
        self.lock = threading.RLock()
        self._last = 1000
        self._server = _Server(self)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def write(self, name: str, content: bytes, *, size: int | None = None, encoding: str | None = None) -> Entry:
        """Write an object as another process would; with a `size` its content is repeated up to it."""
        with self.lock:
            self._last += 1
            entry = Entry(self._last, content, len(content) if size is None else size, "", encoding)
            checksum = 0
            for block in entry.read(0, entry.size):
                checksum = google_crc32c.extend(checksum, block)
            entry.crc32c = stated(checksum)
            self.entries[name] = entry
            return entry

    def forget_meanwhile(self, method: str, name: str) -> None:
        with self.lock:
            action = self.meanwhile.pop((method, name), None)
        if action:
            action()

    def matches(self, name: str, match: str | None) -> None:
        """Raise Refused unless the object is of the generation that a request names."""
        generation = self.entries[name].generation if name in self.entries else 0
        if match is not None and int(match) != generation:
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")

    def take(self, name: str, content: bytes, metadata: dict[str, Any], match: str | None) -> dict[str, Any]:
        """Write an object as a client asked."""
        with self.lock:
            self.matches(name, match)
            if self.damages:
                content = bytes([content[0] ^ 1]) + content[1:]
            else:
                compare(metadata, stated(google_crc32c.value(content)))
            entry = self.write(name, content, encoding=metadata.get("contentEncoding"))
            entry.metadata = metadata.get("metadata", {})
            return self.resource(name, entry)

    def complete(self, session: Session) -> dict[str, Any]:
        with self.lock:
            if self.keep:
                session.done = self.take(session.name, bytes(session.received), session.stated, session.match)
            else:
                self.matches(session.name, session.match)
                compare(session.stated, stated(session.checksum))
                entry = self.write(session.name, b"")
                entry.size, entry.crc32c = session.count, stated(session.checksum)
                session.done = self.resource(session.name, entry)
            return session.done

    def resource(self, name: str, entry: Entry) -> dict[str, Any]:
        return {
            "kind": "storage#object", "name": name, "bucket": "bucket", "generation": str(entry.generation),
            "metageneration": "1", "size": str(entry.size), "crc32c": entry.crc32c,
            "metadata": entry.metadata,
        } | ({"contentEncoding": entry.encoding} if entry.encoding else {})  # fmt: skip


def stated(checksum: int) -> str:
    return base64.b64encode(checksum.to_bytes(4, "big")).decode()


def compare(metadata: dict[str, Any], found: str) -> None:
    if metadata.get("crc32c") not in (None, found):
        raise Refused(400, f'Provided CRC32C "{metadata["crc32c"]}" doesn\'t match calculated CRC32C "{found}".')


class _Server(ThreadingHTTPServer):
    """Requests in threads; a connection that breaks is nothing to report."""

    daemon_threads = True

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    @property
    def store(self) -> ObjectStore:
        return self.server.store

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_DELETE(self) -> None:
        self._answer(self._delete)

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_PUT(self) -> None:
        self._answer(self._put)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, action: Callable[[str], None]) -> None:
        self.url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(self.url.query).items()}
        found = re.fullmatch(r"(?:/(?:up|down)load)?/storage/v1/b/bucket/o(?:/(.*))?", self.url.path)
        try:
            if found is None:
                raise Refused(404, "The specified bucket does not exist.")
            action(unquote(found[1] or ""))
        except Refused as refused:
            self.close_connection = True  # the body may not have been read
            self._json({"error": {"code": refused.code, "message": str(refused)}}, refused.code)

    def _heard(self, name: str, detail: str = "") -> None:
        with self.store.lock:
            self.store.asked.append((self.command, name, detail))
        self.store.forget_meanwhile(self.command, name)

    def _get(self, name: str) -> None:
        if not name:
            self._heard("", self.query.get("prefix", ""))
            self._list()
            return
        media = self.query.get("alt") == "media"
        wanted = self.headers.get("Range", "")
        self._heard(name, wanted if media else "metadata")
        entry = self.store.entries.get(name)
        if entry is None or self.query.get("generation", str(entry.generation)) != str(entry.generation):
            raise Refused(404, f"No such object: bucket/{name}")
        if not media:
            self._json(self.store.resource(name, entry))
            return
        self._media(entry, wanted)

    def _media(self, entry: Entry, wanted: str) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        start, end = (int(found[1]), min(int(found[2]) + 1, entry.size)) if found else (0, entry.size)
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(end - start))
        if found:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{entry.size}")
        if entry.encoding:
            self.send_header("Content-Encoding", entry.encoding)
        self.end_headers()
        for block in entry.read(start, end):
            self.wfile.write(block)

    def _list(self) -> None:
        with self.store.lock:
            prefix = self.query.get("prefix", "")
            names = sorted(name for name in self.store.entries if name.startswith(prefix))
            first = int(self.query.get("pageToken", "0"))
            end = first + self.store.page
            items = [self.store.resource(name, self.store.entries[name]) for name in names[first:end]]
        after = {"nextPageToken": str(end)} if end < len(names) else {}
        self._json({"kind": "storage#objects", "items": items, **after})

    def _delete(self, name: str) -> None:
        self._heard(name)
        with self.store.lock:
            if name not in self.store.entries:
                raise Refused(404, f"No such object: bucket/{name}")
            self.store.matches(name, self.query.get("ifGenerationMatch"))
            del self.store.entries[name]
        self.send_response(204)
        self.end_headers()

    def _post(self, _: str) -> None:
        body = self.rfile.read(length := int(self.headers["Content-Length"]))
        if len(body) < length:
            raise ConnectionResetError
        kind, match = self.query["uploadType"], self.query.get("ifGenerationMatch")
        if kind == "multipart":
            metadata, content = parts(self.headers["Content-Type"], body)
            self._heard(metadata["name"], kind)
            self._json(self.store.take(metadata["name"], content, metadata, match))
            return
        metadata = json.loads(body)
        self._heard(metadata["name"], kind)
        with self.store.lock:
            self.store.matches(metadata["name"], match)
            number = f"session-{len(self.store.sessions)}"
            self.store.sessions[number] = Session(metadata["name"], metadata, match)
        self.send_response(200)
        self.send_header("Location", f"http://{self.headers['Host']}{self.path}&upload_id={number}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _put(self, _: str) -> None:
        session = self.store.sessions.get(self.query["upload_id"])
        if session is None:
            raise Refused(404, "No such session.")
        stated_range = self.headers["Content-Range"]
        self._heard(session.name, stated_range)
        piece = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", stated_range)
        if piece:
            self._receive(session, int(piece[1]), int(piece[2]) + 1 - int(piece[1]))
        total = int(stated_range.rpartition("/")[2])
        if session.done is None and session.count == total:
            self.store.complete(session)
        if session.done is not None:
            self._json(session.done)
            return
        self.send_response(308)
        if session.count:
            self.send_header("Range", f"bytes=0-{session.count - 1}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _receive(self, session: Session, start: int, length: int) -> None:
        """Take a piece; of one that breaks off, its whole blocks."""
        assert start == session.count, f"{session.name}: sent from {start}, {session.count} are here"
        left = length
        while left and (block := self.rfile.read(min(left, BLOCK_BYTES))):
            left -= len(block)
            if left and len(block) < BLOCK_BYTES:
                raise ConnectionResetError
            session.count += len(block)
            session.checksum = google_crc32c.extend(session.checksum, block)
            if self.store.keep:
                session.received += block
        if left:
            raise ConnectionResetError

    def _json(self, value: object, code: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def parts(content_type: str, body: bytes) -> tuple[dict[str, Any], bytes]:
    """The metadata and the content of a multipart upload."""
    boundary = content_type.partition("boundary=")[2].strip('"').encode()
    first, second = body.split(b"--" + boundary)[1:3]
    metadata = json.loads(first.partition(b"\r\n\r\n")[2])
    return metadata, second.partition(b"\r\n\r\n")[2][:-2]
