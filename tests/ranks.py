"""Starts real rank processes (gloo, one thread each) that run configs without Ray.

They are forked from a server that has imported torch, DeepSpeed and transformers, which takes
seconds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import ports
import rank_main


class Rank:
    """A forked rank, with the interface of `subprocess.Popen`."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.pid: int = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@cache
def _server() -> Any:
    """Return the context that forks from a server; the server has the variables common to all
    ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_preload"])
    before = os.environ.copy()
    os.environ.update(
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
        PYTHONPATH=os.pathsep.join(filter(None, sys.path)),
    )
    forkserver.ensure_running()  # it finds its imports through PYTHONPATH only
    os.environ.clear()
    os.environ.update(before)
    return context


def _run(path: str, log: str, env: dict[str, str]) -> None:
    """Run as a rank."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable(2)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    sys.stdout, sys.stderr = (
        os.fdopen(1, "w", 1, closefd=False),
        os.fdopen(2, "w", 1, closefd=False),
    )
    os.environ.clear()
    os.environ.update(env)
    if "NETNS" in env:
        import namespaces  # imports pytest, which other ranks do not need

        namespaces.enter(namespaces.NETNS_FOLDER + env["NETNS"])
    rank_main.main(path)
    sys.stdout.flush()


def start_ranks(
    size: int,
    configs: list[dict[str, Any]],
    folder: Path,
    env: dict[str, str] | None = None,
    each: Sequence[dict[str, str]] = (),
) -> list[Rank]:
    """Start `size` processes that run `configs` in turn; each rank's output goes to
    folder/rank-N.log.

    `each` holds further variables of each rank: NETNS names its network namespace, and a rank with
    LD_PRELOAD is its own program.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "configs.json").write_text(json.dumps(configs))
    port = ports.find_free_port()
    processes: list[Any] = []
    for rank in range(size):
        rank_env = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            **(env or {}),
            **(each[rank] if each else {}),
        }
        if "LD_PRELOAD" in rank_env:  # needs its own program
            with open(folder / f"rank-{rank}.log", "w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, rank_main.__file__, str(folder / "configs.json")],
                        env=rank_env,
                        stdout=log,
                        stderr=log,
                    )
                )
            continue
        process = _server().Process(
            target=_run,
            args=(str(folder / "configs.json"), str(folder / f"rank-{rank}.log"), rank_env),
        )
        process.start()
        processes.append(Rank(process))
    return processes


def run_ranks(
    size: int,
    configs: list[dict[str, Any]],
    folder: Path,
    timeout_s: float = 300,
    env: dict[str, str] | None = None,
) -> list[int]:
    """Run `configs` on `size` ranks to the end and return the exit codes."""
    processes = start_ranks(size, configs, folder, env)
    try:
        return [process.wait(timeout_s) for process in processes]
    except subprocess.TimeoutExpired:
        raise AssertionError(_describe_hung_ranks(processes, folder, timeout_s)) from None
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _describe_hung_ranks(processes: list[Rank], folder: Path, timeout_s: float) -> str:
    """Return the state of each rank and the end of its log, with the stacks of running ones (by
    SIGABRT)."""
    descriptions = []
    for rank, process in enumerate(processes):
        code = process.poll()
        if code is None:
            process.send_signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        descriptions.append(
            f"rank {rank}: {'still running' if code is None else f'ended with {code}'}\n"
            + (folder / f"rank-{rank}.log").read_text(errors="replace")[-6000:]
        )
    return f"not done after {timeout_s:g} s\n" + "\n".join(descriptions)


def require_ok(codes: list[int], folder: Path) -> None:
    """Fail with the end of a rank's output if any rank failed."""
    for rank, code in enumerate(codes):
        if code != 0:
            tail = (folder / f"rank-{rank}.log").read_text(errors="replace")[-3000:]
            raise AssertionError(f"rank {rank} ended with {code}:\n{tail}")


def wait_for_death(processes: list[Rank], timeout_s: float = 180) -> list[int]:
    """Wait until one rank has died, kill the others as a scheduler would, and return the exit
    codes."""
    deadline = time.monotonic() + timeout_s
    while all(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in processes:
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.kill()
    return [process.wait() for process in processes]
