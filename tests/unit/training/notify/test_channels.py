"""Delivery to a real command and to a real HTTP server, each of any behavior."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import webhook

from dist_ft.training.notify.channels import CommandChannel, WebhookChannel, url_problem
from dist_ft.training.notify.notice import Notice

NOTICE = Notice("give_up", "r", "s3://b/r", 7, "2026-01-01T00:00:00+00:00", "it failed")


def program(folder: Path, code: str) -> list[str]:
    """Return the command that runs Python code."""
    path = folder / "notify.py"
    path.write_text(code)
    return [sys.executable, str(path), "a word", "$HOME; exit 3"]


def test_command_gets_the_notice_twice_and_no_shell(tmp_path: Path) -> None:
    code = (
        "import json, os, sys\n"
        f"json.dump([json.load(sys.stdin), sys.argv[1:], dict(os.environ)], open({str(tmp_path / 'seen')!r}, 'w'))"
    )
    assert CommandChannel(program(tmp_path, code)).deliver(NOTICE, 30) is None
    document, words, environment = json.loads((tmp_path / "seen").read_text())
    assert document == NOTICE.to_json() and words == ["a word", "$HOME; exit 3"]
    assert NOTICE.to_environment().items() <= environment.items()
    assert environment["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("code", "expected", "may_pass"),
    [
        ("import sys; print('why', file=sys.stderr); sys.exit(4)", "exit code 4 (why)", True),
        ("import sys; sys.stdin.close(); sys.exit(1)", "exit code 1", True),
        ("import time; time.sleep(60)", "did not end within 1 s", True),
    ],
)
def test_failure_of_a_command_is_one_line(
    code: str, expected: str, may_pass: bool, tmp_path: Path
) -> None:
    problem = CommandChannel(program(tmp_path, code)).deliver(NOTICE, 1 if "60" in code else 30)
    assert problem is not None and expected in problem.text and problem.may_pass == may_pass
    assert "\n" not in problem.text


def is_running(pid: int) -> bool:
    """Return whether a process exists that nobody killed; an orphan stays a zombie here."""
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_command_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(60)"
    )
    channel = CommandChannel(program(tmp_path, code))
    start_s = time.monotonic()
    problem = channel.deliver(NOTICE, 3)
    assert problem is not None and time.monotonic() - start_s < 10
    until = time.monotonic() + 10
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        while is_running(pid):
            assert time.monotonic() < until, pid
            time.sleep(0.05)


def test_unknown_command_is_not_tried_again() -> None:
    problem = CommandChannel(["/no/such/program"]).deliver(NOTICE, 5)
    assert problem is not None and not problem.may_pass
    assert problem.text == "/no/such/program cannot be started (No such file or directory)"


def test_webhook_gets_json_with_the_text_of_slack() -> None:
    with webhook.serve(200) as server:
        assert WebhookChannel("DIST_FT_WEBHOOK", server.url).deliver(NOTICE, 10) is None
        assert server.requests == [NOTICE.to_webhook()] and server.paths == [webhook.PATH]
        assert server.requests[0]["text"] == "dist_ft run r: it failed"


@pytest.mark.parametrize(
    ("status", "may_pass"), [(500, True), (503, True), (429, True), (403, False), (404, False)]
)
def test_refusal_of_a_webhook(status: int, may_pass: bool) -> None:
    with webhook.serve(status) as server:
        problem = WebhookChannel("HOOK", server.url).deliver(NOTICE, 10)
    assert problem is not None
    assert (problem.text, problem.may_pass) == (f"the server answered {status}", may_pass)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_to_another_host_is_not_followed(status: int) -> None:
    with webhook.serve(200) as other, webhook.serve(status, location=other.url) as server:
        problem = WebhookChannel("HOOK", server.url).deliver(NOTICE, 10)
        assert problem is not None and not problem.may_pass
        assert problem.text == f"the server answered {status}; redirects are not followed"
        assert len(server.paths) == 1 and other.paths == []


def test_server_that_does_not_answer_costs_the_time_limit() -> None:
    with webhook.serve(0) as server:
        start_s = time.monotonic()
        problem = WebhookChannel("HOOK", server.url).deliver(NOTICE, 0.5)
        assert problem is not None and problem.may_pass
        assert problem.text == "no answer within 0.5 s" and time.monotonic() - start_s < 5


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9" + webhook.PATH,
        "http://no-such-host.invalid" + webhook.PATH,
        "http://127.0.0.1:port" + webhook.PATH,
        "http://user:pw@127.0.0.1:9" + webhook.PATH,
        "https://127.0.0.1:9/with space" + webhook.PATH,
        "http://127.0.0.1:9/line\nbreak" + webhook.PATH,
        "http://[::1" + webhook.PATH,
        "file:///etc/passwd" + webhook.PATH,
        "ftp://127.0.0.1" + webhook.PATH,
        webhook.PATH,
        "",
    ],
)
def test_problem_with_the_url_never_shows_it(url: str) -> None:
    problem = WebhookChannel("HOOK", url).deliver(NOTICE, 5)
    assert problem is not None
    for secret in ("T000", "s3cret", "pw@", "127.0.0.1", "passwd"):
        assert secret not in problem.text, problem.text


def test_url_of_the_webhook_in_a_message_is_replaced() -> None:
    with webhook.serve(200) as server:
        quoted = Notice("end", "r", "s3://b/r", 7, "2026-01-01", f"failed at {server.url}")
        assert WebhookChannel("HOOK", server.url).deliver(quoted, 10) is None
        assert server.requests[0]["message"] == "failed at <webhook>"
        assert "s3cret" not in json.dumps(server.requests)


def test_only_http_urls_are_accepted() -> None:
    assert url_problem("https://hooks.example.com/x") == url_problem("http://127.0.0.1:8/x") == ""
    assert "http or https" in url_problem("file:///etc/passwd")
    assert "user name" in url_problem("https://a:b@host/x")
