"""What is made of the end of a training process. The supervisor with real processes: tests/integration."""

from __future__ import annotations

import signal

import pytest

from dist_ft.runtime.elastic import supervisor
from dist_ft.runtime.elastic.supervisor import how_it_ended


@pytest.mark.parametrize(
    ("code", "oom_kills", "kind", "said"),
    [
        (75, 0, "hang", "no progress within cluster.progress_timeout_s"),
        (1, 0, "hang", "its stacks are in its log"),
        (-signal.SIGKILL, 0, "killed", "by SIGKILL, from outside"),
        (-signal.SIGKILL, 1, "out of memory", "the kernel killed the process for want of memory"),
        (-signal.SIGSEGV, 0, "crash", "by SIGSEGV"),
        (-signal.SIGABRT, 1, "crash", "by SIGABRT"),
        (-signal.SIGTERM, 0, "killed", "by SIGTERM"),
        (-63, 0, "crash", "by signal 63"),
        (3, 0, "crash", "exit code 3"),
    ],
)
def test_the_end_of_a_process_has_a_name(code, oom_kills, kind, said):
    found, text = how_it_ended(code, oom_kills)
    assert found == kind and said in text


def test_kills_by_the_kernel_are_counted_where_it_tells(tmp_path, monkeypatch):
    path = tmp_path / "memory.events"
    monkeypatch.setattr(supervisor, "OOM_EVENTS", str(path))
    assert supervisor._oom_kills() == 0
    path.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 7\n")
    assert supervisor._oom_kills() == 2
