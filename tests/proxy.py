"""A proxy in front of an HTTP object store that injects faults: delays, resets, short or altered
bodies, errors."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

ERRORS = {301: "PermanentRedirect", 403: "ExpiredToken", 500: "InternalError", 503: "SlowDown"}


@dataclass(frozen=True)
class Fault:
    """What happens to one answer.

    Attributes:
        status: answer with this error, without a request to the store.
        code: S3's name of the error; "": the usual one.
        delay_s: wait before answering.
        reset_after: send this many bytes of the body, then reset the connection.
        stall_after, stall_s: send this many bytes, then nothing for this time, then reset.
        truncate: remove this many bytes from the end of the body, with a matching Content-Length.
        flip: alter the byte at this offset of the body.
        error_inside: answer 200 with an S3 error document as the body.
    """

    status: int = 0
    code: str = ""
    delay_s: float = 0
    reset_after: int | None = None
    stall_after: int | None = None
    stall_s: float = 0
    truncate: int = 0
    flip: int | None = None
    error_inside: bool = False


Chooser = Callable[[str, str], "Fault | None"]


class Answer(NamedTuple):
    """An answer of the store."""

    status: int
    headers: dict[str, str]
    content: bytes


class FaultyProxy:
    """Serves on loopback until closed; `choose(method, path)` returns the fault of each request."""

    def __init__(self, upstream_port: int, choose: Chooser = lambda method, path: None) -> None:
        self.choose = choose
        self.requests: list[tuple[str, str, str | None]] = []
        self.num_faults = 0
        self.bytes_per_s: float | None = None
        self.dropped_headers: tuple[str, ...] = ()  # lower case; the store does not get them
        self._free_at, self._lock = 0.0, threading.Lock()
        self._upstream = upstream_port
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing."""

            def _serve(self) -> None:
                proxy.serve(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

        return Handler

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.requests.append((request.command, request.path, request.headers.get("Range")))
        fault = self.choose(request.command, request.path)
        self.num_faults += fault is not None
        fault = fault or Fault()
        time.sleep(fault.delay_s)
        if fault.status:
            answer = error_document(fault.status, fault.code)
            self._send(request, fault.status, {"Content-Type": "application/xml"}, answer, Fault())
            return
        status, headers, content = self._forward(request, body)
        if fault.error_inside:
            content = error_document(500)
        content = content[: len(content) - fault.truncate]
        if fault.flip is not None and fault.flip < len(content):
            content = (
                content[: fault.flip] + bytes([content[fault.flip] ^ 1]) + content[fault.flip + 1 :]
            )
        self._send(request, status, headers, content, fault)

    def _forward(self, request: BaseHTTPRequestHandler, body: bytes) -> Answer:
        upstream = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=60)
        try:
            sent = {
                key: value
                for key, value in request.headers.items()
                if key.lower() not in self.dropped_headers
            }
            upstream.request(request.command, request.path, body or None, sent)
            answer = upstream.getresponse()
            content = answer.read()
            headers = {
                key: value
                for key, value in answer.getheaders()
                if key.lower() not in ("transfer-encoding", "connection", "date", "server")
            }
            return Answer(answer.status, headers, content)
        finally:
            upstream.close()

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        content: bytes,
        fault: Fault,
    ) -> None:
        length = headers.get("Content-Length") if request.command == "HEAD" else str(len(content))
        try:
            request.send_response(status)
            for key, value in headers.items():
                if key.lower() != "content-length":
                    request.send_header(key, value)
            request.send_header("Content-Length", length or "0")
            request.end_headers()
            cut = fault.reset_after if fault.reset_after is not None else fault.stall_after
            if request.command == "HEAD":
                return
            if cut is None or cut >= len(content):
                self._write(request, content)
                return
            self._write(request, content[:cut])
            request.wfile.flush()
            if fault.stall_after is not None:
                time.sleep(fault.stall_s)
            reset(request.connection)
            request.close_connection = True
        except (BrokenPipeError, ConnectionResetError):
            request.close_connection = True

    def _write(self, request: BaseHTTPRequestHandler, content: bytes) -> None:
        """Write a body; all bodies together are sent at most at `bytes_per_s`."""
        if self.bytes_per_s is None:
            request.wfile.write(content)
            return
        for start in range(0, len(content), 65536):
            chunk = content[start : start + 65536]
            with self._lock:
                self._free_at = max(self._free_at, time.monotonic()) + len(chunk) / self.bytes_per_s
                wait = self._free_at - time.monotonic()
            time.sleep(max(0.0, wait))
            request.wfile.write(chunk)


def reset(connection: socket.socket) -> None:
    """Close a connection so that the other side sees a reset, not a normal end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def error_document(status: int, code: str = "") -> bytes:
    """Return S3's body of an error."""
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code or ERRORS.get(status, "Error")}</Code><Message>injected'
        f"</Message></Error>"
    ).encode()


def sometimes(
    share: float,
    fault: Fault,
    seed: int = 0,
    methods: tuple[str, ...] = ("GET", "PUT", "HEAD", "POST"),
) -> Chooser:
    """Return a chooser that injects `fault` into a random `share` of the requests."""
    rng, lock = random.Random(seed), threading.Lock()

    def choose(method: str, path: str) -> Fault | None:
        with lock:
            return fault if method in methods and rng.random() < share else None

    return choose


def at_first(times: int, fault: Fault) -> Chooser:
    """Return a chooser that injects `fault` into the first `times` requests for each path."""
    num_requests: Counter[str] = Counter()
    lock = threading.Lock()

    def choose(method: str, path: str) -> Fault | None:
        with lock:
            num_requests[path] += 1
            return fault if num_requests[path] <= times else None

    return choose
