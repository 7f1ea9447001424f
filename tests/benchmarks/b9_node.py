"""B9, lost node: time from killing a node to the first step on the other: Ray Train / dist_ft.

    python tests/benchmarks/b9_node.py

A new cluster for each measurement, all on this machine: a head without CPUs and two nodes of one
CPU each. An elastic run of one or two workers trains on it. After half a minute of training, the
processes of one node are killed. The sides alternate; the killed node changes every round. Ours is
the time until the driver's terminal shows the first step afterwards, the peer's until the step is
done.
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
TIMEOUT_S = 300.0


def main() -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--under-way-s", type=float, default=30, help="seconds of training before the kill"
    )
    parser.add_argument(
        "--sides",
        nargs="+",
        default=["ray_s", "ours_s"],
        help="one side only: no table and no JSON file",
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
                    node_numbers = [cluster.add(), cluster.add()]
                    times[side].append(
                        {"ray_s": measure_ray, "ours_s": measure_ours}[side](
                            base,
                            number,
                            cluster.address,
                            args.under_way_s,
                            partial(cluster.kill, node_numbers[number % 2]),
                        )
                    )
                finally:
                    cluster.close()
                print(
                    f"round {number + 1}: {side} {times[side][-1]:.2f}", file=sys.stderr, flush=True
                )
    if len(times) < 2:
        return
    ratio = harness.ratio(times["ray_s"], times["ours_s"])
    harness.print_table(
        "B9 node lost to first step on fewer workers",
        ("Ray Train", "dist_ft", "Ray / ours [95 %]", "goal"),
        [
            (
                *(
                    ", ".join(f"{value:.1f} s" for value in times[side])
                    for side in ("ray_s", "ours_s")
                ),
                str(ratio),
                harness.format_goal(ratio, 3.0, at_least=True),
            )
        ],
    )
    harness.save_results(
        "b9_node",
        {"rounds": args.rounds, "under_way_s": args.under_way_s},
        environment,
        {**times, "ray_over_ours": ratio},
        args.out,
    )


def measure_ray(
    base: Path, number: int, address: str, under_way_s: float, kill: Callable[[], None]
) -> float:
    """Return the seconds of Ray Train from the kill to the first step on one worker."""
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
        killed_at_s = time.time()
        kill()
        _wait(lambda: steps()[-1][0] == 1, process, folder / "log")
    finally:
        process.kill()
        process.wait()
    return next(at for world, _, at in steps() if world == 1) - killed_at_s


def measure_ours(
    base: Path, number: int, address: str, under_way_s: float, kill: Callable[[], None]
) -> float:
    """Return the seconds of dist_ft from the kill to the line of the first step on one worker."""
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

    def has_one_worker() -> bool:
        """Return whether the latest attempt has one worker."""
        latest = max(attempts.glob("*.json"))
        return json.loads(latest.read_text())["world_size"] == 1

    def num_attempts() -> int:
        return len(list(attempts.glob("*.json")))

    try:
        _wait(lambda: any(line.startswith("step ") for _, line in lines), process, log)
        time.sleep(under_way_s)
        killed_at_s, num_before = time.time(), num_attempts()
        kill()
        _wait(lambda: num_attempts() > num_before and has_one_worker(), process, log)
        start_text = f"(attempt {num_attempts()})"
        _wait(lambda: first_step_s(lines, start_text) is not None, process, log)
    finally:
        process.kill()
        process.wait()
        reader.join(5)
    detected_s = next(
        (at - killed_at_s for at, line in lines if at > killed_at_s and "nodes were lost" in line),
        None,
    )
    print(
        f"  Ray reported the node as lost after {detected_s or math.nan:.2f} s",
        file=sys.stderr,
        flush=True,
    )
    return (first_step_s(lines, start_text) or math.nan) - killed_at_s


def first_step_s(lines: list[tuple[float, str]], start_text: str) -> float | None:
    """Return when the terminal showed the first step after the line with `start_text`."""
    start = next((i for i, (_, line) in enumerate(lines) if start_text in line), len(lines))
    return next((at for at, line in lines[start:] if line.startswith("step ")), None)


def _wait(condition: Callable[[], bool], process: subprocess.Popen[Any], log: Path) -> None:
    """Wait until the condition is true; exit if the process ends or after TIMEOUT_S."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        has_ended = process.poll() is not None
        if has_ended or time.monotonic() > deadline:
            problem = "the run has ended" if has_ended else f"not after {TIMEOUT_S:g} s"
            raise SystemExit(f"{problem}:\n{log.read_text()[-3000:]}")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
