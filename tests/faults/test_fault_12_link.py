"""Fault 12 between ranks: a link that is slow and loses packets. Slower, and the same to the last bit."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import history
import namespaces
import pytest
import ranks
import tiny

pytestmark = [*namespaces.MARKS, pytest.mark.skipif(shutil.which("tc") is None, reason="needs `tc` (traffic control)")]


def test_fault_12_a_slow_link_between_ranks_that_loses_packets_changes_no_bit(tmp_path: Path) -> None:
    base, took_s, lost = tiny.base(tmp_path, samples=40), {}, 0.0
    for name in ("fast", "slow"):
        with namespaces.pair() as link:
            if name == "slow":
                for side in link:
                    namespaces.throttle(side["NETNS"], "30mbit", 24_000)
            begun = time.monotonic()
            processes = ranks.start_ranks(2, [tiny.config(base, name, workers=2)], base / name, each=link)
            ranks.require_ok([process.wait(200) for process in processes], base / name)
            took_s[name] = time.monotonic() - begun
            if name == "slow":
                counts = [namespaces.packets(side["NETNS"]) for side in link]
                lost = sum(count for _, count in counts) / sum(sent for sent, _ in counts)
    print(f"{lost:.1%} of the packets lost; {took_s['fast']:.1f} s and {took_s['slow']:.1f} s")
    assert lost > 0.01 and took_s["slow"] > took_s["fast"]
    assert history.losses(base / "runs/slow") == history.losses(base / "runs/fast")
    history.require_exactly_once(base / "runs/slow", tiny.config(base, "slow", workers=2))
