"""Which notices the events of a run become."""

from __future__ import annotations

import json
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from unit.small import run_config

from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError, Interrupted, LimitReached, WorkerError
from dist_ft.training.notify import monitor as monitor_module
from dist_ft.training.notify.monitor import RunMonitor, monitor_run
from dist_ft.training.notify.notice import Notice
from dist_ft.training.result import Result


class Recorder:
    """Replaces the notifier."""

    has_channels = True

    def __init__(self) -> None:
        self.notices: list[Notice] = []
        self.closed_after: list[float] = []

    def send(self, notice: Notice) -> None:
        self.notices.append(notice)

    def close(self, wait_s: float = 30) -> None:
        self.closed_after.append(wait_s)

    def events(self) -> list[tuple[str, str]]:
        return [(notice.event, notice.message) for notice in self.notices]


def config(folder: Path, **notify: Any) -> RunConfig:
    return run_config(str(folder), log={"notify": {"command": ["true"], **notify}})


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(monitor_module.Notifier, "from_config", lambda _: found)
    return found


@pytest.mark.parametrize(
    ("error", "event", "message"),
    [
        (Interrupted("stopped at step 3"), "end", "stopped at step 3"),
        (LimitReached("run.max_hours=1: reached"), "end", "run.max_hours=1: reached"),
        (KeyboardInterrupt(), "end", "stopped by the user; saved checkpoints are kept"),
        (WorkerError("gave up"), "give_up", "gave up"),
        (ConfigError(["a", "b"]), "give_up", "config: 2 problems   - a   - b"),
        (KeyError("x"), "give_up", "ended by KeyError: 'x'"),
    ],
)
def test_end_without_a_result(
    error: BaseException, event: str, message: str, recorder: Recorder, tmp_path: Path
) -> None:
    with pytest.raises(type(error)), monitor_run(config(tmp_path)):
        raise error
    assert [(name, " ".join(text.split())) for name, text in recorder.events()] == [
        (event, " ".join(message.split()))
    ]
    assert recorder.notices[0].storage == f"{tmp_path}/r" and recorder.notices[0].step is None
    assert recorder.closed_after == [30]


def test_complete_run(recorder: Recorder, tmp_path: Path) -> None:
    with monitor_run(config(tmp_path)) as monitor:
        monitor.report_progress(3)
        monitor.report_result(Result("url", 6, 6, 1.25))
    assert recorder.events() == [("end", "complete: step 6 of 6, loss 1.2500")]
    assert recorder.notices[0].step == 6


def test_restarts_are_counted_also_those_before_this_start(
    recorder: Recorder, tmp_path: Path
) -> None:
    run = tmp_path / "r"
    (run / "attempts").mkdir(parents=True)
    (run / "time").mkdir()
    now = datetime.now(timezone.utc)
    for number, minutes in ((1, 50), (2, 40), (3, 30), (4, 90)):
        started_at = (now - timedelta(minutes=minutes)).isoformat()
        record = {"attempt": number, "world_size": 1, "started_at": started_at}
        (run / f"attempts/{number:06d}.json").write_text(json.dumps(record))

    # Attempt 1 was stopped on request, attempt 4 is too long ago: two failures count.
    (run / "time/000001.json").write_text(json.dumps({"ended": "stopped", "seconds": {}}))
    with monitor_run(config(tmp_path, restarts=3)) as monitor:
        assert recorder.events() == []
        monitor.report_restart("worker 1 on node a: hang (no progress)")
    assert recorder.events() == [
        (
            "restarts",
            "3 restarts within 1:00:00; the latest: worker 1 on node a: hang (no progress)",
        )
    ]


def test_command_that_is_started_again_and_again_is_a_restart_too(
    recorder: Recorder, tmp_path: Path
) -> None:
    run = tmp_path / "r"
    (run / "attempts").mkdir(parents=True)
    for number in (1, 2):
        record = {"started_at": datetime.now(timezone.utc).isoformat()}
        (run / f"attempts/{number:06d}.json").write_text(json.dumps(record))
    with monitor_run(config(tmp_path, restarts=2)):
        pass
    assert recorder.events() == [
        (
            "restarts",
            "2 restarts within 1:00:00; the latest: the command was started again after a failed "
            "attempt",
        )
    ]


def test_standstill_is_reported_once(recorder: Recorder, tmp_path: Path) -> None:
    with monitor_run(config(tmp_path, no_progress_s=0.3)) as monitor:
        monitor.report_progress(4)
        time.sleep(0.8)
        assert recorder.events() == [("no_progress", "no progress for 0 s; the last step was 4")]
        monitor.report_progress(5)
        time.sleep(0.6)
    assert [notice.step for notice in recorder.notices] == [4, 5]


def test_only_the_chosen_events_are_reported(recorder: Recorder, tmp_path: Path) -> None:
    with monitor_run(config(tmp_path, events=["give_up"])) as monitor:
        monitor.report_result(Result("url", 6, 6))
        monitor.report_error(WorkerError("gave up"))
    assert recorder.events() == [("give_up", "gave up")]


def test_last_words_before_the_watchdog_ends_the_process(
    recorder: Recorder, tmp_path: Path
) -> None:
    with monitor_run(config(tmp_path)) as monitor:
        monitor.report_hang("no progress for 1800 s")
    assert recorder.events() == [("give_up", "no progress for 1800 s")]
    assert recorder.closed_after[0] == monitor_module.LAST_WORDS_S < 5


def test_notice_that_cannot_be_made_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Broken(Recorder):
        def send(self, notice: Notice) -> None:
            raise RuntimeError("broken")

    RunMonitor(config(tmp_path), Broken()).report_error(WorkerError("x"))  # type: ignore[arg-type]
