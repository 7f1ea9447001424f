"""Fault 10: the link between two ranks is cut, and comes back. The side that was cut off can not commit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import history
import namespaces
import pytest
import ranks
import tiny

from dist_ft.checkpoint import manifest as manifests

pytestmark = namespaces.MARKS
LONG = {"schedule": {"epochs": None, "steps": 400}, "optimizer": {"learning_rate": 5e-4}}


@pytest.fixture
def link() -> Iterator[list[dict[str, str]]]:
    with namespaces.pair() as found:
        yield found


def commits(run: Path) -> dict[int, int]:
    """Return the attempt of every committed step."""
    found = [
        manifests.parse_folder(path.parent.name) for path in run.glob("checkpoints/*/manifest.json")
    ]
    return dict(filter(None, found))


def test_fault_10_the_side_that_was_cut_off_can_not_commit(
    tmp_path: Path, link: list[dict[str, str]]
) -> None:
    base = tiny.base(tmp_path)
    document = tiny.config(
        base,
        "cut",
        workers=2,
        cluster={"progress_timeout_s": 20},
        checkpoint={"keep_last": 1000},
        **LONG,
    )
    run = base / "runs/cut"
    before = ranks.start_ranks(2, [document], base / "before", each=link)
    until = time.monotonic() + 90
    while len(commits(run)) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    namespaces.cut(link[0]["NETNS"])
    seen = commits(run)
    assert seen and max(seen) < 400, (base / "before/rank-0.log").read_text()[-2000:]
    alone = tiny.config(base, "cut", checkpoint={"keep_last": 1000}, **LONG)
    after = ranks.start_ranks(1, [alone], base / "after")
    while not any(attempt == 2 for attempt in commits(run).values()) and time.monotonic() < until:
        time.sleep(0.02)
    namespaces.join(link[0]["NETNS"])  # what was cut off may now go on with what it was doing
    ranks.require_ok([process.wait(120) for process in after], base / "after")
    assert all(process.wait(60) != 0 for process in before), "it ends itself"
    found = commits(run)
    first = min(step for step, attempt in found.items() if attempt == 2)
    late = {step for step, attempt in found.items() if attempt == 1} - set(seen)
    assert all(step < first for step in late), (
        "what the cut-off side had begun may end, but nothing newer may come"
    )
    assert found[400] == 2
    unbroken = tiny.config(base, "whole", **LONG)
    ranks.require_ok(ranks.run_ranks(1, [unbroken], base / "whole"), base / "whole")
    history.require_same(run, base / "runs/whole")
