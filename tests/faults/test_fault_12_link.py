"""Fault 12 between ranks: a link that is slow and loses packets. The run is slower and bit-equal."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import history
import namespaces
import pytest
import ranks
import tiny

pytestmark = [
    *namespaces.MARKS,
    pytest.mark.skipif(shutil.which("tc") is None, reason="needs `tc` (traffic control)"),
]


def step_s(run: Path) -> float:
    """Return the median time of a step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["step_s"] for line in lines if line["kind"] == "train")


def test_fault_12_slow_link_that_loses_packets_gives_bit_equal_losses(
    tmp_path: Path,
) -> None:
    base, runs = tiny.base(tmp_path, samples=40), tmp_path / "runs"
    for name in ("fast", "slow"):
        with namespaces.pair() as link:
            if name == "slow":
                for side in link:
                    namespaces.throttle(side["NETNS"], "15mbit", 24_000)
            processes = ranks.start_ranks(
                2, [tiny.config(base, name, workers=2)], base / name, each=link
            )
            ranks.require_ok([process.wait(200) for process in processes], base / name)
            if name == "slow":
                counts = [namespaces.count_packets(side["NETNS"]) for side in link]
    num_dropped = sum(count.dropped for count in counts)
    lost = num_dropped / sum(count.sent for count in counts)
    print(
        f"{lost:.1%} of the packets lost; {step_s(runs / 'fast'):.2f} and "
        f"{step_s(runs / 'slow'):.2f} s a step"
    )
    assert lost > 0.01 and step_s(runs / "slow") > step_s(runs / "fast")
    assert history.losses(runs / "slow") == history.losses(runs / "fast")
    history.require_exactly_once(runs / "slow", tiny.config(base, "slow", workers=2))
