"""B9, the share of useful time: one run whose training processes are killed with -9 every five minutes.

    python tests/benchmarks/b9_useful.py

Model S on two workers under Ray, micro-batch 4 x 256, ZeRO-1, every save in the background. Useful is the time of the
steps of the committed history (a step that had to be done again counts once), over the time from the beginning of the
first step to the last commit: what is missing are restarts, steps done again, and saves. After the time given the run
is asked to stop, and commits its last step.

The checkpoint interval is what Young's formula says for a save that costs a tenth of a second and a failure every five
minutes: sqrt(2 x 0.1 s x 300 s), 8 s; in steps of this model on two quiet cores (0.7 s, B1), about 10.
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
    """Run, kill, stop; return what the run's own records and the terminal tell."""
    import yaml

    workload.make_model(base / "model-s", "S")
    lengths = workload.lognormal_lengths(4000, 0, max_length=256)
    texts = workload.make_data(base / "texts", lengths, workload.SHAPES["S"]["vocab_size"], 0)
    document = workload.run_config(
        base,
        "S",
        name="useful",
        train=texts,
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
    said: list[str] = []
    reader = threading.Thread(target=_read, args=(process, steps, said), daemon=True)
    reader.start()
    kills: list[dict[str, float]] = []
    try:
        while not steps and process.poll() is None:
            time.sleep(0.1)
        begun = steps[0][0]
        for number in range(1, int(args.minutes / args.kill_every_minutes) + 1):
            at = begun + 60 * args.kill_every_minutes * number
            if at > begun + 60 * args.minutes - 30:
                break
            _sleep_until(at, process)
            kills.append(kill_one(mark, steps))
        _sleep_until(begun + 60 * args.minutes, process)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    except BaseException as error:
        process.kill()
        process.wait()
        raise SystemExit("".join(said[-40:])) from error
    reader.join(10)
    return summarize(base / "runs/useful", steps, kills, begun)


def _read(process: subprocess.Popen[str], steps: list[tuple[float, int]], said: list[str]) -> None:
    """Note when each step was on the terminal."""
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if line.startswith("step "):
            steps.append((time.time(), int(line.split()[1].split("/")[0].replace(",", ""))))


def _sleep_until(at: float, process: subprocess.Popen[str]) -> None:
    while time.time() < at:
        if process.poll() is not None:
            raise RuntimeError("the run has ended")
        time.sleep(0.2)


def kill_one(mark: str, steps: list[tuple[float, int]]) -> dict[str, float]:
    """Kill one of the processes that train: of this run's, the two that have used most time in half a second."""
    before = {pid: _cpu(pid) for pid in _processes(mark)}
    time.sleep(0.5)
    used = sorted(before, key=lambda pid: _cpu(pid) - before[pid], reverse=True)
    victim = random.Random(len(steps)).choice(used[:2])
    killed = time.time()
    os.kill(victim, signal.SIGKILL)
    return {"at": killed, "step": steps[-1][1]}


def _processes(mark: str) -> list[int]:
    """Return the training processes (and spares) of the run that carries `mark` in its environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if (
                folder.name.isdigit()
                and (folder / "cmdline").read_bytes().split(b"\0")[2:3]
                == [b"dist_ft.runtime.elastic.worker_process"]
                and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes()
            ):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def _cpu(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def summarize(
    run: Path, steps: list[tuple[float, int]], kills: list[dict[str, float]], begun: float
) -> dict[str, Any]:
    """Return the share of useful time and the timeline."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = {line["step"]: line["step_s"] for line in lines if line["kind"] == "train"}
    last, ended = max(
        (int(path.parent.name.split("-")[1]), path.stat().st_mtime)
        for path in (run / "checkpoints").glob("step-*/manifest.json")
    )
    committed = [times[step] for step in range(1, last + 1)]
    start = begun - times[1]
    wall = ended - start
    for kill in kills:
        kill["back_s"] = next(at for at, _ in steps if at > kill["at"] + 1.0) - kill["at"]
        kill["from_step"] = next(step for at, step in steps if at > kill["at"] + 1.0)
        kill["at"] -= start
    return {
        "steps": last,
        "wall_s": wall,
        "useful": sum(committed) / wall,
        "median_step_s": median(committed),
        "useful_by_median": last * median(committed) / wall,
        "kills": kills,
        "attempts": len(list((run / "attempts").glob("*.json"))),
        "timeline": [{"at": round(at - start, 1), "step": step} for at, step in steps[::20]],
    }


if __name__ == "__main__":
    main()
