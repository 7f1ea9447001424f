"""B9, useful time: a run in which a training process is killed with SIGKILL every five minutes.

    python tests/benchmarks/b9_useful.py

Model S on two workers under Ray, micro-batch 4 x 256, ZeRO-1, all saves in the background. The
useful share is the time of the committed steps (a repeated step counts once) / the time from the
start of the first step to the last checkpoint. The rest is restarts, repeated steps and saves.
After --minutes the run is requested to stop, and saves a checkpoint of its last step.

The checkpoint interval follows Young's formula for a save that costs 0.1 s and a failure every five
minutes: sqrt(2 x 0.1 s x 300 s) = 8 s, about 10 steps of this model on two idle cores (0.7 s, B1).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

import harness
import workload

MARK = "DIST_FT_B9"
GOAL = 0.95


def main() -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=14)
    parser.add_argument("--kill-every-minutes", type=float, default=5)
    parser.add_argument("--every-steps", type=int, default=10, help="checkpoint interval")
    parser.add_argument("--out", help="JSON file to write instead of results/b9_useful.json")
    args = parser.parse_args()
    harness.require_one_thread()
    environment = harness.describe_environment()
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="dist_ft-b9-") as name:
        result = measure(Path(name), args)
    harness.print_table(
        f"B9 useful time of {result['wall_s'] / 60:.1f} minutes, {len(result['kills'])} kills",
        ("steps", "useful", "steps x median", "restarts", "goal"),
        [
            (
                str(result["steps"]),
                f"{result['useful']:.3f}",
                f"{result['useful_by_median']:.3f}",
                ", ".join(f"{kill['back_s']:.1f} s" for kill in result["kills"]),
                f">= {GOAL}: {'reached' if result['useful'] >= GOAL else 'missed'}",
            )
        ],
    )
    harness.save_results(
        "b9_useful",
        {key: getattr(args, key) for key in ("minutes", "kill_every_minutes", "every_steps")},
        environment,
        result,
        args.out,
    )


def measure(base: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run, kill and stop; return the results from the run's records and its terminal."""
    import yaml

    workload.make_model(base / "model-s", "S")
    lengths = workload.lognormal_lengths(4000, 0, max_length=256)
    data = workload.make_data(base / "texts", lengths, workload.SHAPES["S"]["vocab_size"], 0)
    document = workload.run_config(
        base,
        "S",
        name="useful",
        train=data,
        sequence_length=256,
        micro_batch=4,
        lanes=2,
        steps=10**6,
        workers=2,
    )
    document["cluster"]["cpus_per_worker"] = 0.5
    document["checkpoint"] = {"every_steps": args.every_steps}
    (base / "run.yaml").write_text(yaml.safe_dump(document))
    mark = uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_ft.cli", "train", str(base / "run.yaml"), "--skip-check"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, MARK: mark},
    )
    steps: list[tuple[float, int]] = []
    output: list[str] = []
    reader = threading.Thread(target=_read, args=(process, steps, output), daemon=True)
    reader.start()
    kills: list[dict[str, float]] = []
    try:
        while not steps and process.poll() is None:
            time.sleep(0.1)
        first_step_s = steps[0][0]
        for number in range(1, int(args.minutes / args.kill_every_minutes) + 1):
            kill_at_s = first_step_s + 60 * args.kill_every_minutes * number
            if kill_at_s > first_step_s + 60 * args.minutes - 30:
                break
            _sleep_until(kill_at_s, process)
            kills.append(kill_one(mark, steps))
        _sleep_until(first_step_s + 60 * args.minutes, process)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    except BaseException as error:
        process.kill()
        process.wait()
        raise SystemExit("".join(output[-40:])) from error
    reader.join(10)
    return summarize(base / "runs/useful", steps, kills, first_step_s)


def _read(
    process: subprocess.Popen[str], steps: list[tuple[float, int]], output: list[str]
) -> None:
    """Collect the output, and the time at which the terminal shows each step."""
    assert process.stdout is not None
    for line in process.stdout:
        output.append(line)
        if line.startswith("step "):
            steps.append((time.time(), int(line.split()[1].split("/")[0].replace(",", ""))))


def _sleep_until(until_s: float, process: subprocess.Popen[str]) -> None:
    """Sleep until a time; raise RuntimeError if the process ends before."""
    while time.time() < until_s:
        if process.poll() is not None:
            raise RuntimeError("the run has ended")
        time.sleep(0.2)


def kill_one(mark: str, steps: list[tuple[float, int]]) -> dict[str, float]:
    """Kill one of the two training processes; return when, and the last step before.

    The training processes are those of this run that use the most CPU time in half a second; the
    others are spares.
    """
    before = {pid: _cpu(pid) for pid in _processes(mark)}
    time.sleep(0.5)
    by_use = sorted(before, key=lambda pid: _cpu(pid) - before[pid], reverse=True)
    victim = random.Random(len(steps)).choice(by_use[:2])
    killed_at_s = time.time()
    os.kill(victim, signal.SIGKILL)
    return {"at": killed_at_s, "step": steps[-1][1]}


def _processes(mark: str) -> list[int]:
    """Return the ids of the worker processes (and spares) that have `mark` in their environment."""
    process_ids = []
    for folder in Path("/proc").iterdir():
        try:
            if (
                folder.name.isdigit()
                and (folder / "cmdline").read_bytes().split(b"\0")[2:3]
                == [b"dist_ft.runtime.elastic.worker_process"]
                and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes()
            ):
                process_ids.append(int(folder.name))
        except OSError:
            continue
    return process_ids


def _cpu(pid: int) -> int:
    """Return the CPU time of a process in clock ticks; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def summarize(
    run: Path, steps: list[tuple[float, int]], kills: list[dict[str, float]], first_step_s: float
) -> dict[str, Any]:
    """Return the share of useful time and the timeline."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = {line["step"]: line["step_s"] for line in lines if line["kind"] == "train"}
    last_step, end_s = max(
        (int(path.parent.name.split("-")[1]), path.stat().st_mtime)
        for path in (run / "checkpoints").glob("step-*/manifest.json")
    )
    committed = [times[step] for step in range(1, last_step + 1)]
    start_s = first_step_s - times[1]
    wall_s = end_s - start_s
    for kill in kills:
        resumed_at_s, step = next((at, step) for at, step in steps if at > kill["at"] + 1.0)
        kill["back_s"] = resumed_at_s - kill["at"]
        kill["from_step"] = step
        kill["at"] -= start_s
    return {
        "steps": last_step,
        "wall_s": wall_s,
        "useful": sum(committed) / wall_s,
        "median_step_s": median(committed),
        "useful_by_median": last_step * median(committed) / wall_s,
        "kills": kills,
        "attempts": len(list((run / "attempts").glob("*.json"))),
        "timeline": [{"at": round(at - start_s, 1), "step": step} for at, step in steps[::20]],
    }


if __name__ == "__main__":
    main()
