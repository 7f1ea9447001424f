"""B9: from the kill of a worker to the first new step. Ray Train's own restart / dist_ft's.

    python tests/benchmarks/b9_restart.py

Two workers of a small model on a Ray of their own, one killed with -9 once the run is under way; both sides one after
the other, several rounds. Neither side's time of start counts. Ours is the time until the line of the first new step
is on the driver's terminal, the peer's until the step is done.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))


def main() -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--kill-at", type=int, default=200, help="step (from 0) at which worker 1 dies; ours"
    )
    parser.add_argument("--out", help="JSON file to write instead of results/b9_restart.json")
    args = parser.parse_args()
    harness.require_one_thread()
    environment = harness.describe_environment()
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.pop("RAY_ADDRESS", None)
    import tiny

    with tempfile.TemporaryDirectory(prefix="dist_ft-b9-") as name:
        base = tiny.base(Path(name))
        times: dict[str, list[float]] = {"ray_s": [], "ours_s": []}
        for number in range(args.rounds):
            for side, measure in (("ray_s", ray), ("ours_s", ours)):
                times[side].append(measure(base, number, args.kill_at))
                print(
                    f"round {number + 1}: {side} {times[side][-1]:.2f}", file=sys.stderr, flush=True
                )
    found = harness.ratio(times["ray_s"], times["ours_s"])
    harness.print_table(
        "B9 kill to first new step",
        ("Ray Train", "dist_ft", "Ray / ours [95 %]", "goal"),
        [
            (
                ", ".join(f"{value:.1f} s" for value in times["ray_s"]),
                ", ".join(f"{value:.1f} s" for value in times["ours_s"]),
                str(found),
                harness.format_goal(found, 3.0, at_least=True),
            )
        ],
    )
    harness.save_results(
        "b9_restart",
        {"rounds": args.rounds, "kill_at": args.kill_at},
        environment,
        {**times, "ray_over_ours": found},
        args.out,
    )


def ray(base: Path, number: int, kill_at: int) -> float:
    """Return Ray Train's seconds from the kill to the first step after it."""
    folder = base / f"ray-{number}"
    folder.mkdir()
    command = [
        sys.executable,
        str(HERE / "b9_ray.py"),
        str(base / "model"),
        str(folder),
        str(kill_at + 20),
        str(kill_at),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
    killed = (folder / "killed").stat().st_mtime
    steps = [
        tuple(map(float, line.split())) for line in (folder / "steps").read_text().splitlines()
    ]
    restarted = next(i for i in range(1, len(steps)) if steps[i][0] <= steps[i - 1][0])
    return steps[restarted][1] - killed


def ours(base: Path, number: int, kill_at: int) -> float:
    """Return dist_ft's."""
    import tiny
    import yaml

    document: dict[str, Any] = tiny.config(
        base,
        f"ours-{number}",
        workers=2,
        stage=1,
        schedule={"epochs": None, "steps": kill_at + 20},
        checkpoint={"every_steps": 20},
    )
    path, once = base / f"ours-{number}.yaml", base / f"ours-{number}-killed"
    path.write_text(yaml.safe_dump(document))
    environment = {
        **os.environ,
        "DIST_FT_FAILPOINT": f"train.step:{kill_at + 1}@1",
        "DIST_FT_FAILPOINT_ONCE": str(once),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_ft.cli", "train", str(path), "--skip-check"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    assert process.stdout is not None
    first, again, lines = None, False, []
    for line in process.stdout:
        lines.append(line)
        again |= "(attempt 2)" in line
        if again and first is None and line.startswith("step "):
            first = time.time()
    if process.wait() or first is None:
        raise SystemExit("".join(lines[-40:]))
    return first - once.stat().st_mtime


if __name__ == "__main__":
    main()
