"""Reports the health of a run's workers to the monitor that sends notices. Imports no Ray."""

from __future__ import annotations

from dist_ft.core.errors import PLANNED
from dist_ft.runtime.elastic.messages import RunHealth
from dist_ft.training.notify.monitor import RunMonitor


class HealthWatch:
    """Finds what changed since the last look."""

    def __init__(self, monitor: RunMonitor) -> None:
        self._monitor = monitor
        self._generation = 0
        self._num_signs = 0

    def check(self, health: RunHealth) -> None:
        """Report progress and restarts after failures."""
        if health.num_signs != self._num_signs:
            self._num_signs = health.num_signs
            self._monitor.report_progress(health.step)

        # A resize and an announced loss are no failures.
        if health.generation != self._generation:
            self._generation = health.generation
            if health.reason and not health.reason.startswith(PLANNED):
                self._monitor.report_restart(health.reason)
