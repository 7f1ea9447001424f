"""An HTTP server on loopback that records the requests it gets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Request(NamedTuple):
    """A request as it arrived; names of headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]


class Answer(NamedTuple):
    """What the server answers."""

    status: int = 404
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


Respond = Callable[[Request], Answer]


@dataclass
class Recorder:
    """The server.

    Attributes:
        url: without a slash at the end.
        requests: all that arrived.
    """

    url: str = ""
    requests: list[Request] = field(default_factory=list)

    def received(self) -> str:
        """Return all requests as text, to search for what was sent."""
        return "\n".join(map(repr, self.requests))


@contextmanager
def recording(respond: Respond = lambda request: Answer()) -> Iterator[Recorder]:
    """Run a server that answers as `respond` says; without it, 404 to everything."""
    recorder = Recorder()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            self.rfile.read(length)
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path, headers)
            recorder.requests.append(request)
            answer = respond(request)
            self.send_response(answer.status)
            for name, value in answer.headers:
                self.send_header(name, value)
            self.send_header("content-length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PROPFIND = do_OPTIONS = _serve

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    recorder.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield recorder
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
