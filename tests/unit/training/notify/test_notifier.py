"""Delivery in the background: retries, limits, one line for each failure, no effect on the run."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import webhook
from unit.small import run_config

from dist_ft.training.notify import notifier as notifier_module
from dist_ft.training.notify.channels import DeliveryProblem, WebhookChannel
from dist_ft.training.notify.notice import Notice
from dist_ft.training.notify.notifier import MAX_WAITING, TRIES, Notifier

NOTICE = Notice("end", "r", "s3://b/r", 7, "2026-01-01T00:00:00+00:00", "complete")


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifier_module, "PAUSE_S", 0.01)
    monkeypatch.setattr(logging.getLogger("dist_ft"), "propagate", True)


class FakeChannel:
    name = "fake"

    def __init__(self, *problems: DeliveryProblem | Exception | None) -> None:
        self.problems = list(problems)
        self.num_calls = 0
        self.was_aborted = False
        self.wait = threading.Event()
        self.wait.set()

    def deliver(self, notice: Notice, timeout_s: float) -> DeliveryProblem | None:
        self.num_calls += 1
        self.wait.wait(60)
        problem = self.problems[min(self.num_calls, len(self.problems)) - 1]
        if isinstance(problem, Exception):
            raise problem
        return problem

    def abort(self) -> None:
        self.was_aborted = True
        self.wait.set()


def test_server_that_fails_twice_gets_the_notice_a_third_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with webhook.serve(500, 503, 200) as server:
        notifier = Notifier([WebhookChannel("HOOK", server.url)], timeout_s=10)
        notifier.send(NOTICE)
        notifier.close()
        assert len(server.requests) == 3 and caplog.text == ""


def test_tries_are_bounded_and_the_failure_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with webhook.serve(500) as server:
        notifier = Notifier([WebhookChannel("HOOK", server.url)], timeout_s=10)
        notifier.send(NOTICE)
        notifier.close()
        assert len(server.requests) == TRIES
    assert [record.getMessage() for record in caplog.records] == [
        "log.notify.webhook_env=HOOK: a notice was not delivered (end): the server answered 500"
    ]
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize(
    ("problem", "num_calls", "text"),
    [
        (DeliveryProblem("refused", False), 1, "refused"),
        (DeliveryProblem("busy", True), TRIES, "busy"),
        (RuntimeError("with http://secret"), 1, "unexpected RuntimeError"),
    ],
)
def test_failures(
    problem: DeliveryProblem | Exception,
    num_calls: int,
    text: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    channel = FakeChannel(problem)
    notifier = Notifier([channel], timeout_s=1)
    notifier.send(NOTICE)
    notifier.close()
    assert channel.num_calls == num_calls
    assert [record.getMessage() for record in caplog.records] == [
        f"fake: a notice was not delivered (end): {text}"
    ]


def test_sending_never_waits_and_closing_waits_for_a_limited_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stuck, healthy = FakeChannel(None), FakeChannel(None)
    stuck.wait.clear()
    notifier = Notifier([stuck, healthy], timeout_s=1)
    start_s = time.monotonic()
    for _ in range(MAX_WAITING + 5):
        notifier.send(NOTICE)
        time.sleep(0.005)
    assert time.monotonic() - start_s < 1

    notifier.close(wait_s=0.3)
    assert time.monotonic() - start_s < 3
    assert stuck.was_aborted and healthy.num_calls == MAX_WAITING + 5
    messages = [record.getMessage() for record in caplog.records]
    assert messages.count("fake: a notice was dropped (end)") >= 1, "the queue is bounded"
    assert messages[-1] == "fake: a notice was not delivered in time"


def test_channels_of_the_config(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MY_HOOK", raising=False)
    assert not Notifier.from_config(run_config("runs")).has_channels
    unset = run_config("runs", log={"notify": {"webhook_env": "MY_HOOK"}})
    assert not Notifier.from_config(unset).has_channels
    assert caplog.records[-1].getMessage().startswith("log.notify.webhook_env=MY_HOOK: this vari")
    monkeypatch.setenv("MY_HOOK", "https://host/secret")
    notifier = Notifier.from_config(unset)
    assert notifier.has_channels
    notifier.close()
