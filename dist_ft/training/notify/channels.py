"""Where notices go: to a command, or to a webhook. One call is one attempt with a time limit.

The URL of a webhook is a secret. Guarantees: it is in no message of a failure, and no request goes
anywhere else: redirects are not followed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Protocol
from urllib.parse import urlsplit

from typing_extensions import override

from dist_ft.training.notify.notice import Notice, clean

REQUEST_TIMEOUT, TOO_MANY_REQUESTS = 408, 429
"""HTTP status codes of refusals that a later attempt may not get."""
FIRST_SERVER_ERROR = 500
MAX_OUTPUT_BYTES = 4096


@dataclass(frozen=True)
class DeliveryProblem:
    """Why a notice was not delivered.

    Attributes:
        text: the reason, without the URL of a webhook.
        may_pass: whether another attempt may succeed.
    """

    text: str
    may_pass: bool


class Channel(Protocol):
    """Where notices go.

    Attributes:
        name: the config field that sets it.
    """

    name: str

    def deliver(self, notice: Notice, timeout_s: float) -> DeliveryProblem | None:
        """Try to deliver a notice; return why it failed, or None."""

    def abort(self) -> None:
        """End an attempt that is under way, if that is possible."""


class CommandChannel:
    """Runs a command for each notice."""

    name = "log.notify.command"

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._process: subprocess.Popen[bytes] | None = None

    def deliver(self, notice: Notice, timeout_s: float) -> DeliveryProblem | None:
        """Run the command with the notice on its standard input and in its environment."""
        content = json.dumps(notice.to_json()).encode()

        # A file rather than a pipe: a process that the command leaves behind would keep a pipe
        # open, and reading its end would wait.
        with tempfile.TemporaryFile() as output:
            try:
                process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=output,
                    env={**os.environ, **notice.to_environment()},
                    start_new_session=True,  # so that its children can be ended with it
                )
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or type(error).__name__
                return DeliveryProblem(f"{self._command[0]} cannot be started ({reason})", False)

            self._process = process
            try:
                process.communicate(content, timeout_s)
            except subprocess.TimeoutExpired:
                self.abort()
                return DeliveryProblem(f"the command did not end within {timeout_s:g} s", True)

            if process.returncode == 0:
                return None
            return DeliveryProblem(
                f"the command ended with exit code {process.returncode}{_last_line(output)}", True
            )

    def abort(self) -> None:
        """Kill the command and its children."""
        process = self._process
        if process is None or process.poll() is not None:
            return

        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class WebhookChannel:
    """Posts each notice as JSON to a URL."""

    def __init__(self, variable: str, url: str) -> None:
        """Store the name of the variable that holds the `url`, for messages, and the URL."""
        self.name = f"log.notify.webhook_env={variable}"
        self._url = url
        self._opener = urllib.request.build_opener(_NoRedirects)

    def deliver(self, notice: Notice, timeout_s: float) -> DeliveryProblem | None:
        """Post the notice; an answer of 2xx is success."""
        problem = url_problem(self._url)
        if problem:
            return DeliveryProblem(problem, False)

        try:
            # `Request` refuses some URLs, and names them.
            request = urllib.request.Request(
                self._url,
                data=json.dumps(self._document(notice)).encode(),
                headers={"Content-Type": "application/json", "User-Agent": "dist-ft"},
                method="POST",
            )
            with self._opener.open(request, timeout=timeout_s):
                return None
        except urllib.error.HTTPError as error:
            error.close()
            return _refusal(error.code)
        except (OSError, HTTPException, ValueError) as error:
            return DeliveryProblem(_connection_problem(error, timeout_s), True)

    def abort(self) -> None:
        """Do nothing: the attempt ends with its time limit or with this process."""

    def _document(self, notice: Notice) -> Mapping[str, Any]:
        # A message may quote the environment; the receiver knows the URL, but it may show texts.
        document = notice.to_webhook()
        return {
            name: value.replace(self._url, "<webhook>") if isinstance(value, str) else value
            for name, value in document.items()
        }


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    @override
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Refuse all: a notice must not go to another host, and a POST would become a GET."""
        return None


def url_problem(url: str) -> str:
    """Return what is wrong with the URL of a webhook, without showing it; "" if nothing is."""
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        has_user = "@" in parts.netloc
        _ = parts.port  # raises ValueError for a port that is no number
    except ValueError:
        return "the variable does not hold a valid URL"

    if not is_valid or not url.isprintable() or " " in url:
        return "the variable does not hold an http or https URL"
    if has_user:
        return "the URL has a user name or password, which is not supported"
    return ""


def _refusal(status: int) -> DeliveryProblem:
    text = f"the server answered {status}"
    if 300 <= status < 400:
        return DeliveryProblem(f"{text}; redirects are not followed", False)

    may_pass = status >= FIRST_SERVER_ERROR or status in (REQUEST_TIMEOUT, TOO_MANY_REQUESTS)
    return DeliveryProblem(text, may_pass)


def _connection_problem(error: BaseException, timeout_s: float) -> str:
    """Return an error of the connection in words of ours: its own text may hold the URL."""
    # urllib wraps the error of the connection.
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return f"no answer within {timeout_s:g} s"
    if isinstance(reason, socket.gaierror):
        return "no connection (the host is not known)"
    if isinstance(reason, OSError) and reason.errno:
        return f"no connection ({os.strerror(reason.errno)})"

    cause = reason if isinstance(reason, BaseException) else error
    return f"no answer ({type(cause).__name__})"


def _last_line(output: Any) -> str:
    """Return the last line that a command wrote to standard error, in parentheses."""
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - MAX_OUTPUT_BYTES))
    lines = output.read().decode("utf-8", "replace").strip().splitlines()
    if not lines:
        return ""
    return f" ({clean(lines[-1])[:200]})"
