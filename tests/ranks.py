"""Starts real rank processes (gloo, one thread each) that run configs without Ray."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MAIN = Path(__file__).with_name("rank_main.py")


def start_ranks(size: int, configs: list[dict[str, Any]], folder: Path, env: dict[str, str] | None = None
                ) -> list[subprocess.Popen[bytes]]:
    """Start `size` processes that run `configs` in turn; each rank's output goes to folder/rank-N.log."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "configs.json").write_text(json.dumps(configs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(size):
        rank_env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
                    "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(env or {})}
        with open(folder / f"rank-{rank}.log", "wb") as log:
            processes.append(subprocess.Popen([sys.executable, str(MAIN), str(folder / "configs.json")],
                                              env=rank_env, stdout=log, stderr=subprocess.STDOUT))
    return processes


def run_ranks(size: int, configs: list[dict[str, Any]], folder: Path, timeout_s: float = 300,
              env: dict[str, str] | None = None) -> list[int]:
    """Run `configs` on `size` ranks to the end and return the exit codes."""
    processes = start_ranks(size, configs, folder, env)
    try:
        return [process.wait(timeout_s) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def require_ok(codes: list[int], folder: Path) -> None:
    """Fail with the end of a rank's output if any rank failed."""
    for rank, code in enumerate(codes):
        if code != 0:
            tail = (folder / f"rank-{rank}.log").read_text(errors="replace")[-3000:]
            raise AssertionError(f"rank {rank} ended with {code}:\n{tail}")


def wait_for_death(processes: list[subprocess.Popen[bytes]], timeout_s: float = 180) -> list[int]:
    """Wait until one rank has died, end the others as a scheduler would (their group is broken), return the codes."""
    deadline = time.monotonic() + timeout_s
    while all(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in processes:
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.kill()
    return [process.wait() for process in processes]
