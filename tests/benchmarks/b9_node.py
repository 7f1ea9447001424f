"""B9, a lost node: from the kill of a node to the first step on the node that is left. Ray Train's own / dist_ft's.

    python tests/benchmarks/b9_node.py

A cluster of a head without CPUs and two nodes of one CPU each, all on this machine, anew for each measurement; an
elastic run of one or two workers on it. Once it has been under way for half a minute, one node's processes are killed
(not told to stop). Both sides in turn, which node dies changes every round. Ours is the time until the line of the
first step after it is on the driver's terminal, the peer's until the step is done.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
PATIENCE_S = 300.0


def main() -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--under-way-s", type=float, default=30, help="seconds of training before the node dies"
    )
    parser.add_argument(
        "--sides", nargs="+", default=["ray_s", "ours_s"], help="one alone: a try, no JSON"
    )
    parser.add_argument("--out", help="JSON file to write instead of results/b9_node.json")
    args = parser.parse_args()
    harness.require_one_thread()
    environment = harness.describe_environment()
    os.environ.pop("RAY_ADDRESS", None)
    import nodes
    import tiny

    times: dict[str, list[float]] = {side: [] for side in args.sides}
    with tempfile.TemporaryDirectory(prefix="dist_ft-b9-") as name:
        base = tiny.base(Path(name))
        for number in range(args.rounds):
            for side in args.sides:
                cluster = nodes.Nodes()
                try:
                    two = [cluster.add(), cluster.add()]
                    times[side].append(
                        {"ray_s": ray, "ours_s": ours}[side](
                            base,
                            number,
                            cluster.address,
                            args.under_way_s,
                            partial(cluster.kill, two[number % 2]),
                        )
                    )
                finally:
                    cluster.close()
                print(
                    f"round {number + 1}: {side} {times[side][-1]:.2f}", file=sys.stderr, flush=True
                )
    if len(times) < 2:
        return
    found = harness.ratio(times["ray_s"], times["ours_s"])
    harness.print_table(
        "B9 node lost to first step on fewer workers",
        ("Ray Train", "dist_ft", "Ray / ours [95 %]", "goal"),
        [
            (
                *(
                    ", ".join(f"{value:.1f} s" for value in times[side])
                    for side in ("ray_s", "ours_s")
                ),
                str(found),
                harness.format_goal(found, 3.0, at_least=True),
            )
        ],
    )
    harness.save_results(
        "b9_node",
        {"rounds": args.rounds, "under_way_s": args.under_way_s},
        environment,
        {**times, "ray_over_ours": found},
        args.out,
    )


def ray(
    base: Path, number: int, address: str, under_way_s: float, kill: Callable[[], None]
) -> float:
    """Return Ray Train's seconds from the kill to the first step of one worker."""
    folder = base / f"ray-{number}"
    folder.mkdir()

    def steps() -> list[tuple[float, ...]]:
        path = folder / "steps"
        lines = path.read_text().splitlines() if path.exists() else []
        return [tuple(map(float, line.split())) for line in lines if len(line.split()) == 3]

    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                str(HERE / "b9_ray_elastic.py"),
                str(base / "model"),
                str(folder),
                address,
            ],
            stdout=log,
            stderr=log,
        )
    try:
        _wait(lambda: bool(steps()) and steps()[0][0] == 2, process, folder / "log")
        time.sleep(under_way_s)
        killed = time.time()
        kill()
        _wait(lambda: steps()[-1][0] == 1, process, folder / "log")
    finally:
        process.kill()
        process.wait()
    return next(at for world, _, at in steps() if world == 1) - killed


def ours(
    base: Path, number: int, address: str, under_way_s: float, kill: Callable[[], None]
) -> float:
    """Return dist_ft's."""
    import tiny
    import yaml

    name = f"ours-{number}"
    document: dict[str, Any] = tiny.config(
        base,
        name,
        workers=2,
        stage=1,
        schedule={"epochs": None, "steps": 10**5},
        checkpoint={"every_steps": 20},
        cluster={"workers": [1, 2], "cpus_per_worker": 1},
    )
    path, log = base / f"{name}.yaml", base / f"{name}.log"
    path.write_text(yaml.safe_dump(document))
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_ft.cli", "train", str(path), "--skip-check"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "RAY_ADDRESS": address},
    )
    lines: list[tuple[float, str]] = []

    def read() -> None:
        assert process.stdout is not None
        with open(log, "w") as file:
            for line in process.stdout:
                lines.append((time.time(), line))
                file.write(f"{time.time():.2f} {line}")
                file.flush()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    attempts = base / "runs" / name / "attempts"

    def on_one() -> bool:
        """Tell whether the newest attempt has one worker, and has said that it began."""
        newest = max(attempts.glob("*.json"))
        return json.loads(newest.read_text())["world_size"] == 1

    try:
        _wait(lambda: any(line.startswith("step ") for _, line in lines), process, log)
        time.sleep(under_way_s)
        killed, before = time.time(), len(list(attempts.glob("*.json")))
        kill()
        _wait(lambda: len(list(attempts.glob("*.json"))) > before and on_one(), process, log)
        said = f"(attempt {len(list(attempts.glob('*.json')))})"
        _wait(lambda: first_step(lines, said) is not None, process, log)
    finally:
        process.kill()
        process.wait()
        reader.join(5)
    noticed = next(
        (at - killed for at, line in lines if at > killed and "nodes were lost" in line), None
    )
    print(
        f"  Ray took the node for lost after {noticed or math.nan:.2f} s",
        file=sys.stderr,
        flush=True,
    )
    return (first_step(lines, said) or math.nan) - killed


def first_step(lines: list[tuple[float, str]], said: str) -> float | None:
    """Return when the first step after the line with `said` was on the terminal."""
    begun = next((i for i, (_, line) in enumerate(lines) if said in line), len(lines))
    return next((at for at, line in lines[begun:] if line.startswith("step ")), None)


def _wait(what: Callable[[], bool], process: subprocess.Popen[Any], log: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while not what():
        if process.poll() is not None or time.monotonic() > until:
            raise SystemExit(
                f"{'it takes too long' if process.poll() is None else 'it has ended'}:\n{log.read_text()[-3000:]}"
            )
        time.sleep(0.05)


if __name__ == "__main__":
    main()
