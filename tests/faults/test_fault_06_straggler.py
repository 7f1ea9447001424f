"""Fault 6: a rank that is stopped and continued repeatedly is named with its node in log and
metrics."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path

import ranks
import tiny


def test_fault_6_a_rank_stopped_half_of_the_time_is_named_and_not_killed(tmp_path: Path) -> None:
    base = tiny.base(tmp_path)
    document = tiny.config(
        base,
        "slow",
        workers=2,
        schedule={"epochs": None, "steps": 60},
        log={"straggler_steps": 10, "level": "info"},
    )
    processes = ranks.start_ranks(2, [document], base / "ranks")
    run, until = base / "runs/slow", time.monotonic() + 120
    while not list(run.glob("checkpoints/*/manifest.json")) and time.monotonic() < until:
        time.sleep(0.05)
    try:
        while all(process.poll() is None for process in processes) and time.monotonic() < until:
            processes[1].send_signal(signal.SIGSTOP)
            time.sleep(0.4)
            processes[1].send_signal(signal.SIGCONT)
            time.sleep(0.2)
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)
    assert [process.wait(60) for process in processes] == [0, 0]
    log = (base / "ranks/rank-0.log").read_text()
    node = socket.gethostname()
    assert f"worker 1 on node {node} is slow: it was stalled (stopped, or without a CPU)" in log, (
        log[-3000:]
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    pace = [line for line in lines if line["kind"] == "pace"]
    assert [line["step"] for line in pace] == [10, 20, 30, 40, 50, 60]
    stopped, other = (
        [line[f"stalled_share/{node}/rank-0000{rank}"] for line in pace] for rank in (1, 0)
    )
    assert max(stopped) > 0.3 and max(stopped) > max(other)
