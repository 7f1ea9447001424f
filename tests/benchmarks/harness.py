"""Shared by all benchmarks: alternating sides, ratios, environment, table, JSON file.

A benchmark is a ratio of two sides that are measured in one run. Sides alternate in blocks, so a
machine that slows down slows both. The interval is a bootstrap over rounds. One side measured
against itself (the control) shows the noise of the machine. This module does not know what is
measured.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("dist-ft", "torch", "deepspeed", "transformers", "accelerate", "numpy")
RESAMPLES = 10_000
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Ratio:
    """A ratio over rounds, with a 95 % bootstrap interval.

    Attributes:
        value: the geometric mean over rounds.
        low: the lower end of the interval.
        high: the upper end of the interval.
        rounds: the number of rounds.
    """

    value: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Ratio:
    """Return the geometric mean over rounds of numerator / denominator.

    Args:
        numerators: one value a round.
        denominators: one value a round, in the same order.
        seed: of the bootstrap.
    """
    numerator_logs = np.log(np.asarray(numerators, dtype=float))
    logs = numerator_logs - np.log(np.asarray(denominators, dtype=float))

    resamples = np.random.default_rng(seed).integers(0, len(logs), (RESAMPLES, len(logs)))
    low, high = np.percentile(logs[resamples].mean(axis=1), [2.5, 97.5])
    return Ratio(float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high)), len(logs))


def side_order(names: Sequence[str], number: int) -> list[str]:
    """Return the order of the sides in a round: it rotates, and every other round is reversed."""
    shift = number // 2 % len(names)
    order = [*names[shift:], *names[:shift]]
    if number % 2 == 1:
        order.reverse()
    return order


def alternate_sides(
    sides: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """Run every side once a round, in changing order; return the values of each side by round."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in side_order(list(sides), number):
            values[name].append(sides[name]())
            print(
                f"round {number + 1} of {rounds}: {name} {values[name][-1]:.4g}",
                file=sys.stderr,
                flush=True,
            )
    return values


def describe_environment() -> dict[str, Any]:
    """Return what a result depends on apart from the code: versions, hardware, date, load."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _cpu_model() -> str:
    """Return the processor's name with its family, model and stepping.

    Some processors report a name that does not identify them.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    numbers = "/".join(fields.get(key, "?") for key in ("cpu family", "model", "stepping"))
    return f"{fields.get('model name', platform.machine())} ({numbers})"


def require_one_thread() -> None:
    """Restart this program with one compute thread, unless it already has one.

    Libraries read the setting when they are imported.
    """
    if any(os.environ.get(key) != value for key, value in ONE_THREAD.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ONE_THREAD})


def run_ranks(
    script: str, arguments: Sequence[str], size: int, log_folder: Path, timeout_s: float
) -> None:
    """Run `script` on `size` ranks (one thread each) and wait until all have ended.

    Raises:
        RuntimeError: a rank failed (with the end of its output), or `timeout_s` was exceeded.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(size):
        env = {
            **os.environ,
            **ONE_THREAD,
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        with open(log_folder / f"rank-{rank}.log", "wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, script, *arguments],
                    env=env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        _wait(processes, log_folder, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], log_folder: Path, deadline: float) -> None:
    """Wait until all ranks have succeeded, one has failed, or the deadline has passed."""
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.2)

    for rank, process in enumerate(processes):
        if process.poll() not in (None, 0):
            tail = (log_folder / f"rank-{rank}.log").read_text(errors="replace")[-4000:]
            raise RuntimeError(f"rank {rank} failed with exit code {process.returncode}:\n{tail}")
    if any(process.poll() is None for process in processes):
        raise RuntimeError("the ranks did not end before the timeout")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def format_goal(measured: Ratio, goal: float, *, at_least: bool) -> str:
    """Return a goal with "reached", "missed" or "undecided" (the interval contains the goal)."""
    verdict = "undecided"
    if measured.low > goal or measured.high < goal:
        verdict = "reached" if (measured.value > goal) == at_least else "missed"
    return f"{'≥' if at_least else '≤'} {goal:g}: {verdict}"


def save_results(
    name: str,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    result: Mapping[str, Any],
    out: str | None,
) -> None:
    """Write the results to results/<name>.json, or to `out` if it is given."""
    path = Path(out) if out else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": name,
        "environment": dict(environment),
        "config": dict(config),
        "result": dict(result),
    }
    path.write_text(json.dumps(record, indent=2, default=_to_json) + "\n", "utf-8")
    is_below_here = path.is_relative_to(Path.cwd())
    print(f"written: {path.relative_to(Path.cwd()) if is_below_here else path.name}")


def _to_json(value: Any) -> Any:
    """Return a Ratio as a dict, and a NumPy number as a float."""
    return asdict(value) if isinstance(value, Ratio) else float(value)
