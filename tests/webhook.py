"""A real HTTP server that receives webhooks: it accepts, refuses, redirects, or never answers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATH = "/services/T000/B000/s3cretPath0123456789"
"""Path of the webhook: who knows it can post, so it must be shown nowhere."""


class Webhook:
    """The test's side.

    Attributes:
        answers: status of each answer in order, the last one for all further; 0: no answer.
        location: where an answer of 3xx redirects to.
        requests: documents that arrived, in order.
        paths: paths of all requests, of any method.
    """

    def __init__(self, answers: list[int], location: str = "") -> None:
        self.answers = answers
        self.location = location
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.is_closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """The URL of the webhook."""
        return f"http://{self.host}{PATH}"

    def wait_for(self, count: int, timeout_s: float = 20) -> list[dict[str, Any]]:
        """Return the documents once there are `count`."""
        until = time.monotonic() + timeout_s
        while len(self.requests) < count:
            assert time.monotonic() < until, f"{len(self.requests)} of {count} arrived"
            time.sleep(0.02)
        return self.requests

    def close(self) -> None:
        """End the server."""
        self.is_closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(webhook) -> type[BaseHTTPRequestHandler]:  # `self` is the request's
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                webhook.paths.append(self.path)
                webhook.requests.append(json.loads(body))
                index = min(len(webhook.requests), len(webhook.answers)) - 1
                status = webhook.answers[index]
                if not status:
                    webhook.is_closing.wait(60)
                    return
                self.send_response(status)
                if webhook.location:
                    self.send_header("Location", webhook.location)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                webhook.paths.append(self.path)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        return Handler


@contextmanager
def serve(*answers: int, location: str = "") -> Iterator[Webhook]:
    """Yield a server that gives these answers."""
    webhook = Webhook(list(answers) or [200], location)
    try:
        yield webhook
    finally:
        webhook.close()
