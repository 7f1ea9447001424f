"""How the exit of a training process is explained; real processes: tests/integration."""

from __future__ import annotations

import signal

import pytest

from dist_ft.runtime.elastic import supervisor
from dist_ft.runtime.elastic.supervisor import explain_exit


@pytest.mark.parametrize(
    ("code", "oom_kills", "kind", "expected_text"),
    [
        (75, 0, "hang", "no progress within cluster.progress_timeout_s"),
        (1, 0, "hang", "its stacks are in its log"),
        (-signal.SIGKILL, 0, "killed", "by SIGKILL, from outside"),
        (
            -signal.SIGKILL,
            1,
            "out of memory",
            "the kernel killed the process because memory ran out",
        ),
        (-signal.SIGSEGV, 0, "crash", "by SIGSEGV"),
        (-signal.SIGABRT, 1, "crash", "by SIGABRT"),
        (-signal.SIGTERM, 0, "killed", "by SIGTERM"),
        (-63, 0, "crash", "by signal 63"),
        (3, 0, "crash", "exit code 3"),
    ],
)
def test_exit_code_is_explained(code, oom_kills, kind, expected_text):
    cause = explain_exit(code, oom_kills)
    assert cause.kind == kind and expected_text in cause.text


def test_kernel_oom_kills_are_counted_if_known(tmp_path, monkeypatch):
    path = tmp_path / "memory.events"
    monkeypatch.setattr(supervisor, "OOM_EVENTS", str(path))
    assert supervisor._count_oom_kills() == 0
    path.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 7\n")
    assert supervisor._count_oom_kills() == 2
