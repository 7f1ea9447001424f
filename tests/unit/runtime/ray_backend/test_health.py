"""What the driver reports to the monitor of notices."""

from __future__ import annotations

from typing import Any

from dist_ft.runtime.elastic.messages import RunHealth
from dist_ft.runtime.ray_backend.health import HealthWatch


class Recorder:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def report_progress(self, step: int | None) -> None:
        self.calls.append(step)

    def report_restart(self, reason: str) -> None:
        self.calls.append(reason)


def test_changes_are_reported_once() -> None:
    recorder = Recorder()
    watch = HealthWatch(recorder)  # type: ignore[arg-type]
    for health in (
        RunHealth(0, "", 0, None),
        RunHealth(0, "", 1, None),
        RunHealth(0, "", 1, None),
        RunHealth(0, "", 5, 3),
        RunHealth(1, "worker 1 on node a: killed (by SIGKILL)", 5, 3),
        RunHealth(1, "worker 1 on node a: killed (by SIGKILL)", 6, 4),
        RunHealth(2, "planned: more workers joined", 6, 4),
    ):
        watch.check(health)
    assert recorder.calls == [None, 3, "worker 1 on node a: killed (by SIGKILL)", 4]
