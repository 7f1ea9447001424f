"""Fault 10: the link between two ranks is cut and restored. The cut-off side cannot commit."""

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


def checkpoint_attempts(run: Path) -> dict[int, int]:
    """Return {step: attempt} of all checkpoints."""
    found = [
        manifests.parse_folder(path.parent.name) for path in run.glob("checkpoints/*/manifest.json")
    ]
    return dict(filter(None, found))


def test_fault_10_cut_off_side_cannot_commit(tmp_path: Path, link: list[dict[str, str]]) -> None:
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
    while len(checkpoint_attempts(run)) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    namespaces.cut_link(link[0]["NETNS"])
    seen = checkpoint_attempts(run)
    assert seen and max(seen) < 400, (base / "before/rank-0.log").read_text()[-2000:]
    alone = tiny.config(base, "cut", checkpoint={"keep_last": 1000}, **LONG)
    after = ranks.start_ranks(1, [alone], base / "after")
    while (
        not any(attempt == 2 for attempt in checkpoint_attempts(run).values())
        and time.monotonic() < until
    ):
        time.sleep(0.02)
    namespaces.restore_link(link[0]["NETNS"])  # the cut-off ranks may now continue
    ranks.require_ok([process.wait(120) for process in after], base / "after")
    assert all(process.wait(60) != 0 for process in before), "it ends itself"
    found = checkpoint_attempts(run)
    first = min(step for step, attempt in found.items() if attempt == 2)
    late = {step for step, attempt in found.items() if attempt == 1} - set(seen)
    assert all(step < first for step in late), (
        "a save that the cut-off side had started may end, but no later one may start"
    )
    assert found[400] == 2
    unbroken = tiny.config(base, "whole", **LONG)
    ranks.require_ok(ranks.run_ranks(1, [unbroken], base / "whole"), base / "whole")
    history.require_same(run, base / "runs/whole")
