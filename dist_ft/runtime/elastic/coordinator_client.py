"""The coordinator of a run as the supervisors of its workers call it."""

from __future__ import annotations

from typing import Any, Protocol

from dist_ft.runtime.elastic.messages import LineKind, RunStatus
from dist_ft.runtime.elastic.restart_policy import Failure
from dist_ft.runtime.elastic.worker_group_state import Member


class CoordinatorClient(Protocol):
    """The coordinator as a supervisor calls it."""

    def join(self, member: Member, num_checkpoints: int) -> RunStatus: ...  # noqa: D102
    def status(self, member: Member, num_checkpoints: int) -> RunStatus: ...  # noqa: D102
    def report_failure(self, generation: int, failure: Failure) -> None: ...  # noqa: D102
    def num_checkpoints(self) -> int: ...  # noqa: D102
    def report_checkpoint(self, url: str, metrics: dict[str, float], group: str) -> None: ...  # noqa: D102
    def report_progress_sign(self, step: int | None, group: str) -> None: ...  # noqa: D102
    def report_local_checkpoint(self, group: str) -> None: ...  # noqa: D102
    def report_save_done(self, number: int, group: str) -> None: ...  # noqa: D102
    def add_line(self, kind: LineKind, text: str) -> None: ...  # noqa: D102
    def end_run(self, outcome: Any, group: str) -> None: ...  # noqa: D102
