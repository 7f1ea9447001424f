"""What a training process reports if it fails before training; real processes: tests/integration."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError
from dist_ft.runtime.elastic import worker_process
from dist_ft.runtime.elastic.messages import Setup, TrainingCrashed, TrainingFailed


class ProcessEnd(BaseException):
    """Raised in place of the end of the process."""


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch):
    """Run `main` in this process, given what its supervisor sends; return what it answers."""

    def exit_process(code: int) -> None:
        raise ProcessEnd(code)

    monkeypatch.setattr(os, "_exit", exit_process)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    monkeypatch.setattr(worker_process, "_die_with_parent", lambda: None)

    def run(send: Callable[[Connection], None]) -> object:
        ours, theirs = Pipe()
        with ours, theirs:
            send(ours)
            monkeypatch.setattr(sys, "argv", ["", str(os.dup(theirs.fileno()))])
            with pytest.raises(ProcessEnd, match="0"):
                worker_process.main()
            assert ours.poll(10)
            return ours.recv()

    return run


def test_setup_that_cannot_be_unpickled_is_reported_as_a_crash(run_main):
    message = run_main(lambda pipe: pipe.send_bytes(b"cno_such_module\nThing\n."))
    assert message == TrainingCrashed(
        False, "failed before training: ModuleNotFoundError: No module named 'no_such_module'"
    )


def test_invalid_config_is_reported_as_a_crash_in_one_line(run_main):
    message = run_main(lambda pipe: pipe.send(Setup({"batch": 1}, "")))
    assert isinstance(message, TrainingCrashed) and not message.is_peer_loss
    assert message.text.startswith("failed before training: ValidationError: ")
    assert "batch" in message.text and "\n" not in message.text


def test_folder_that_cannot_be_entered_is_reported_as_a_crash(run_main, tmp_path, monkeypatch):
    def refuse(folder: str) -> None:
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "chdir", refuse)
    message = run_main(lambda pipe: pipe.send(Setup({}, str(tmp_path))))
    assert message == TrainingCrashed(
        False,
        f"failed before training: PermissionError: [Errno 13] Permission denied: '{tmp_path}'",
    )


def test_own_error_before_training_keeps_its_type(run_main, monkeypatch):
    def refuse(config: object) -> None:
        raise ConfigError(["task.name: wrong"])

    monkeypatch.setattr(RunConfig, "model_validate", refuse)
    message = run_main(lambda pipe: pipe.send(Setup({}, "")))
    assert isinstance(message, TrainingFailed) and isinstance(message.error, ConfigError)


def test_process_that_is_no_longer_needed_ends_without_a_message(monkeypatch):
    monkeypatch.setattr(worker_process, "_die_with_parent", lambda: None)
    ours, theirs = Pipe()
    monkeypatch.setattr(sys, "argv", ["", str(os.dup(theirs.fileno()))])
    theirs.close()
    ours.close()
    worker_process.main()
