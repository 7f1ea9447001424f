"""Where the time of a real run went: two ranks, killed twice, left lying for a while, started again."""

from __future__ import annotations

import json
import time
from pathlib import Path

import ranks
import tiny

from dist_ft.planning import goodput
from dist_ft.runs import catalog, time_accounting
from dist_ft.storage.filesystem import Store

PAUSE_S = 3.0


def test_goodput_of_a_run_killed_twice_is_attributed(tmp_path: Path) -> None:
    base = tiny.base(tmp_path, samples=70)
    document, folder = tiny.config(base, "killed", workers=2, stage=2), tmp_path / "ranks"
    run = Store(str(base / "runs/killed"))
    started = time.time()
    for failpoint in ("train.step:11@1", "train.step:7@0"):
        codes = ranks.wait_for_death(
            ranks.start_ranks(2, [document], folder, {"DIST_FT_FAILPOINT": failpoint})
        )
        assert -9 in codes, (folder / "rank-0.log").read_text()[-2000:]
    killed = time.time()
    time.sleep(PAUSE_S)
    ranks.require_ok(ranks.run_ranks(2, [document], folder), folder)
    ended = time.time()

    found, broken = time_accounting.read_attempt_times(run)
    assert broken == [] and [account.attempt for account in found] == [1, 2, 3]
    assert found[0].resumed_at == 0 and all(
        later.resumed_at in (4, 8, 12, 16) for later in found[1:]
    )
    seconds = goodput.time_by_part(found)
    assert goodput.attributed_share(seconds) >= 0.99, seconds
    assert sum(seconds.values()) <= ended - started
    assert seconds["restart"] >= PAUSE_S and found[2].started_at - killed >= PAUSE_S
    assert seconds["lost"] > 0, "both kills came between two checkpoints"
    lines = [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    steps_s = sum(
        line["step_s"] for line in lines if line["kind"] == "train"
    )  # of the history that counts
    assert 0.5 * steps_s < seconds["compute"] + seconds["data"] < 1.5 * steps_s + 0.5, (
        steps_s,
        seconds,
    )
    assert 0 < seconds["save"] < 5 and 0 < seconds["start"] < ended - started - PAUSE_S
    said = catalog.describe(run.url)
    assert "over 3 attempts" in said and "% attributed" in said and "restart" in said
