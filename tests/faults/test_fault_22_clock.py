"""Fault 22: clocks that are days apart change no losses, ledger, retention or fencing."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import history
import pytest
import ranks
import tiny

from dist_ft.checkpoint import discovery
from dist_ft.storage.filesystem import Store

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None, reason="needs a C compiler (`cc`), for a clock of one process"
)
DAY_S = 86_400


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("clock") / "clock.so"
    subprocess.run(
        [
            "cc",
            "-shared",
            "-fPIC",
            "-O1",
            "-o",
            str(target),
            str(Path(__file__).with_name("clock.c")),
        ],
        check=True,
    )
    return str(target)


def clock_offset_days(time: str) -> int:
    return round((datetime.fromisoformat(time) - datetime.now(timezone.utc)) / timedelta(days=1))


def test_fault_22_clocks_that_are_days_apart(tmp_path: Path, library: str) -> None:
    """Rank 0's clock is two days ahead in the first attempt, three behind in the second: newer
    looks older."""
    base = tiny.base(tmp_path, samples=70)
    unbroken = tiny.config(base, "unbroken", workers=2, stage=2)
    ranks.require_ok(ranks.run_ranks(2, [unbroken], base / "unbroken"), base / "unbroken")
    document, run = tiny.config(base, "skewed", workers=2, stage=2), base / "runs/skewed"

    def clocks(*days: int) -> list[dict[str, str]]:
        return [
            {"LD_PRELOAD": library, "CLOCK_OFF_S": str(day * DAY_S)} if day else {} for day in days
        ]

    first = ranks.start_ranks(
        2, [document], base / "first", {"DIST_FT_FAILPOINT": "train.step:11@1"}, clocks(2, 0)
    )
    assert -9 in ranks.wait_for_death(first), (base / "first/rank-0.log").read_text()[-2000:]
    then = ranks.start_ranks(2, [document], base / "then", each=clocks(-3, 1))
    ranks.require_ok([process.wait(120) for process in then], base / "then")
    attempts = [json.loads(path.read_text()) for path in sorted((run / "attempts").glob("*.json"))]
    assert [clock_offset_days(attempt["started_at"]) for attempt in attempts] == [2, -3], (
        "the clocks were off"
    )
    assert "resuming from step 8" in (base / "then/rank-0.log").read_text()
    store, whole = Store(str(run)), Store(str(base / "runs/unbroken"))
    names = discovery.list_committed(store)
    assert [name[:14] for name in names] == [
        name[:14] for name in discovery.list_committed(whole)
    ], "the last two"
    assert {
        clock_offset_days(discovery.load_manifest(store, name).created_at) for name in names
    } == {-3}
    assert history.losses(run) == history.losses(whole.url)
    history.require_exactly_once(run, document)
