"""Shared by the guides: the runs of one engine, and tables that two engines must agree on.

All work is done by dist-ft commands. This module prints and runs them, and reads what the runs
stored.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_ft.runs.report import Report

ROOT = Path(__file__).resolve().parents[2]
ENGINES = {
    "plain": ["cluster.workers=0"],
    "zero2": ["cluster.workers=2", "zero.stage=2", "cluster.standby=false"],
    "zero3": ["cluster.workers=2", "zero.stage=3", "cluster.standby=false"],
}
"""Overrides of a config by engine."""
TOLERANCE = 2e-2
"""Largest allowed difference between the metrics of two engines. After hundreds of float32 steps,
rounding decides a few held-out samples near the decision boundary."""
COSTS = ("seconds", "MB", "tokens/s", "ms")
"""Last words of column titles with costs, which are not compared."""


@dataclass
class Table:
    """A table of a guide: heads, and rows of a name and values."""

    title: str
    heads: list[str]
    rows: list[list[Any]]

    def to_markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [f"| {' | '.join(self.heads)} |", f"| --- |{' ---: |' * (len(self.heads) - 1)}"]
        lines += [f"| {' | '.join(format_cell(value) for value in row)} |" for row in self.rows]
        return "\n".join([f"### {self.title}", "", *lines, ""])


@dataclass
class Lab:
    """One engine's part of a guide."""

    name: str
    engine: str
    data: Path
    out: Path
    tables: list[Table] = field(default_factory=list)
    costs: dict[str, tuple[float, float | None]] = field(default_factory=dict)

    def train(self, run: str, config: str, *overrides: str) -> dict[str, Any]:
        """Train a recipe as run `run`; return its report and the `seconds` and `MB` it used."""
        arguments = [
            f"configs/recipes/{config}",
            f"run.name={run}",
            f"run.storage={self.out / 'runs'}",
            f"data.cache_dir={self.out / 'cache'}",
            "checkpoint.keep_best=0",
            *overrides,
            *ENGINES[self.engine],
        ]
        url = f"{self.out / 'runs'}/{run}"
        started = time.monotonic()
        peak = command("train", *arguments, quiet=self.out / f"{run}.log")
        seconds = time.monotonic() - started
        if run not in self.costs:
            self.costs[run] = seconds, peak if self.engine == "plain" else None
        trainable = re.search(
            r"([\d,]+)\s+trainable", (self.out / f"{run}.log").read_text(errors="replace")
        )
        report = gather(url)
        return {
            **report,
            "url": url,
            "seconds": self.costs[run][0],
            "MB": self.costs[run][1],
            "trainable": int(trainable[1].replace(",", "")) if trainable else None,
        }

    def export(self, url: str, *options: str) -> Path:
        """Export a run; return the folder."""
        folder = self.out / "models" / url.rpartition("/")[2]
        shutil.rmtree(folder, ignore_errors=True)
        command("export", url, "--out", str(folder), *options)
        return folder

    def evaluate(self, config: str, *arguments: str, in_process: bool = False) -> dict[str, Any]:
        """Return the metrics of one model by `dist-ft evaluate`, and its `seconds`.

        `in_process`: use one process in any engine.
        """
        started = time.monotonic()
        done = dist_ft(
            "evaluate",
            f"configs/recipes/{config}",
            f"run.storage={self.out / 'runs'}",
            f"data.cache_dir={self.out / 'cache'}",
            *arguments,
            *ENGINES["plain" if in_process else self.engine],
            "--json",
        )
        return {**next(iter(json.loads(done).values())), "seconds": time.monotonic() - started}

    def table(self, title: str, heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Record and print a table. Columns of costs are not compared between engines."""
        self.tables.append(
            Table(f"{title} ({self.engine})", list(heads), [list(row) for row in rows])
        )
        print(f"\n{self.tables[-1].to_markdown()}", flush=True)

    def rows(self, path: str, rows: Iterable[dict[str, Any]]) -> Path:
        """Write rows as JSON Lines into the guide's data folder; return the file."""
        file = self.out / "data" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8"
        )
        return file

    def imported(self, kind: str, name: str, *arguments: str) -> Path:
        """Convert files by `dist-ft data import`; return the result."""
        file = self.out / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        dist_ft("data", "import", kind, *arguments, "--out", str(file))
        return file


def compare(labs: Sequence[Lab]) -> float:
    """Return the largest difference between the numbers of two engines' tables, costs left out."""
    worst = 0.0
    for one, other in zip(labs[0].tables, labs[1].tables, strict=True):
        for left, right in zip(one.rows, other.rows, strict=True):
            for head, a, b in zip(one.heads, left, right, strict=True):
                if head.endswith(COSTS):
                    continue
                if isinstance(a, int | float) and isinstance(b, int | float):
                    worst = max(worst, abs(a - b) / max(1.0, abs(a)))
    return worst


def command(*arguments: str, quiet: Path | None = None) -> float:
    """Print and run a dist-ft command; return the peak memory of its process in MB."""
    say(f"dist-ft {' '.join(arguments)}")
    with open(quiet, "w") if quiet else nullcontext() as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "dist_ft.cli", *arguments], cwd=ROOT, stdout=out, stderr=out
        )
        peak = 0.0  # not by wait4: a child inherits the peak of its parent
        while process.poll() is None:
            peak = max(peak, _peak(process.pid))
            time.sleep(0.1)
    if process.returncode != 0:
        raise SystemExit(
            f"error: exit code {process.returncode}" + (f":\n{tail(quiet)}" if quiet else "")
        )
    return peak


def _peak(pid: int) -> float:
    """Return the peak memory of a process so far in MB (0: it has ended, or this is not Linux)."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def dist_ft(*arguments: str) -> str:
    """Print and run a dist-ft command; return its output."""
    say(f"dist-ft {' '.join(arguments)}")
    done = subprocess.run(
        [sys.executable, "-m", "dist_ft.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(
            f"error: exit code {done.returncode}:\n{(done.stderr + done.stdout)[-3000:]}"
        )
    return done.stdout


def gather(url: str) -> Report:
    """Return the report of a run."""
    from dist_ft.runs import report

    return report.gather(url)


def tail(path: Path | None) -> str:
    """Return the end of a file of output."""
    return path.read_text(errors="replace")[-3000:] if path else ""


def format_cell(value: Any) -> str:
    """Return a cell's text."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() or abs(value) >= 100 else f"{value:.4f}"
    return (
        f"{value:,}"
        if isinstance(value, int)
        else str(value).replace("|", "\\|").replace("\n", " ")
    )


def say(*lines: str) -> None:
    """Print lines under a heading mark."""
    print("\n== " + "\n   ".join(lines), flush=True)
