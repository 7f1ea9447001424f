"""What all benchmarks share: sides in turn, ratios with an interval, what they ran on, a table, a JSON file.

A benchmark is a ratio of two sides measured in one run. Sides alternate in blocks, so that a machine that
slows down slows both; the interval is a bootstrap over rounds; one side against itself shows what the
machine's noise alone does. Does not know what is measured.
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
    """A ratio over rounds: its middle and the ends of a 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def ratio(above: Sequence[float], below: Sequence[float], seed: int = 0) -> Ratio:
    """Return above / below as the geometric mean over rounds, each round being one value of both sides."""
    logs = np.log(np.asarray(above, dtype=float)) - np.log(np.asarray(below, dtype=float))
    drawn = np.random.default_rng(seed).integers(0, len(logs), (RESAMPLES, len(logs)))
    low, high = np.percentile(logs[drawn].mean(axis=1), [2.5, 97.5])
    return Ratio(float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high)), len(logs))


def turns(names: Sequence[str], number: int) -> list[str]:
    """Return the order of the sides in a round: it rotates, and every other round runs backwards."""
    shift = number // 2 % len(names)
    order = [*names[shift:], *names[:shift]]
    return order if number % 2 == 0 else order[::-1]


def alternate(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every side once a round, in changing order, and return what each returned."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in turns(list(sides), number):
            values[name].append(sides[name]())
            print(
                f"round {number + 1} of {rounds}: {name} {values[name][-1]:.4g}",
                file=sys.stderr,
                flush=True,
            )
    return values


def environment() -> dict[str, Any]:
    """Return what a figure depends on besides the code: versions, hardware, date, load."""
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
    """Return the processor's name; families without a telling name get their numbers too."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    numbers = "/".join(found.get(key, "?") for key in ("cpu family", "model", "stepping"))
    return f"{found.get('model name', platform.machine())} ({numbers})"


def one_thread() -> None:
    """Start this program again with one compute thread, unless it has one: the setting is read at import."""
    if any(os.environ.get(key) != value for key, value in ONE_THREAD.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ONE_THREAD})


def run_ranks(
    script: str, arguments: Sequence[str], size: int, log_folder: Path, timeout_s: float
) -> None:
    """Run `script` on `size` ranks (one thread each) to their end.

    Raises RuntimeError with the end of a failing rank's output.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
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
            started.append(
                subprocess.Popen(
                    [sys.executable, script, *arguments],
                    env=env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        _wait(started, log_folder, time.monotonic() + timeout_s)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait(started: Sequence[subprocess.Popen[bytes]], log_folder: Path, deadline: float) -> None:
    """Wait until all ranks ended well; the first that does not ends the wait."""
    while any(process.poll() is None for process in started):
        failed = [rank for rank, process in enumerate(started) if process.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    for rank, process in enumerate(started):
        if process.poll() not in (None, 0):
            tail = (log_folder / f"rank-{rank}.log").read_text(errors="replace")[-4000:]
            raise RuntimeError(f"rank {rank} ended with {process.returncode}:\n{tail}")
    if any(process.poll() is None for process in started):
        raise RuntimeError("the ranks did not end in time")


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
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


def reached(measured: Ratio, goal: float, *, at_least: bool) -> str:
    """Return a goal and whether the whole interval reaches it, as text."""
    word = "undecided"
    if measured.low > goal or measured.high < goal:
        word = "reached" if (measured.value > goal) == at_least else "missed"
    return f"{'≥' if at_least else '≤'} {goal:g}: {word}"


def save(
    name: str,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    result: Mapping[str, Any],
    out: str | None,
) -> None:
    """Write results/<name>.json, or `out` if given."""
    path = Path(out) if out else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": name,
        "environment": dict(environment),
        "config": dict(config),
        "result": dict(result),
    }
    path.write_text(json.dumps(record, indent=2, default=_plain) + "\n", "utf-8")
    print(
        f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name}"
    )


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Ratio) else float(value)
