"""B9: time from killing a worker to the first new step: Ray Train's own restart / dist_ft's.

    python tests/benchmarks/b9_restart.py

Two workers train a small model on their own Ray instance; one is killed with SIGKILL during
training. The sides run one after the other, in several rounds. The start of the run does not count.
Ours is the time until the driver's terminal shows the first new step, the peer's until the step is
done.
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
        "--kill-at", type=int, default=200, help="step (from 0) at which worker 1 is killed"
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
            for side, measure in (("ray_s", measure_ray), ("ours_s", measure_ours)):
                times[side].append(measure(base, number, args.kill_at))
                print(
                    f"round {number + 1}: {side} {times[side][-1]:.2f}", file=sys.stderr, flush=True
                )
    ratio = harness.ratio(times["ray_s"], times["ours_s"])
    harness.print_table(
        "B9 kill to first new step",
        ("Ray Train", "dist_ft", "Ray / ours [95 %]", "goal"),
        [
            (
                ", ".join(f"{value:.1f} s" for value in times["ray_s"]),
                ", ".join(f"{value:.1f} s" for value in times["ours_s"]),
                str(ratio),
                harness.format_goal(ratio, 3.0, at_least=True),
            )
        ],
    )
    harness.save_results(
        "b9_restart",
        {"rounds": args.rounds, "kill_at": args.kill_at},
        environment,
        {**times, "ray_over_ours": ratio},
        args.out,
    )


def measure_ray(base: Path, number: int, kill_at: int) -> float:
    """Return the seconds of Ray Train from the kill to the end of the first new step."""
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
    process = subprocess.run(command, capture_output=True, text=True, timeout=400)
    if process.returncode:
        raise SystemExit(process.stdout[-2000:] + process.stderr[-3000:])
    killed_at_s = (folder / "killed").stat().st_mtime
    steps = [
        tuple(map(float, line.split())) for line in (folder / "steps").read_text().splitlines()
    ]
    # after the restart, training continues from an earlier step
    restarted = next(i for i in range(1, len(steps)) if steps[i][0] <= steps[i - 1][0])
    return steps[restarted][1] - killed_at_s


def measure_ours(base: Path, number: int, kill_at: int) -> float:
    """Return the seconds of dist_ft from the kill to the line of the first new step."""
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
    path = base / f"ours-{number}.yaml"
    kill_file = base / f"ours-{number}-killed"
    path.write_text(yaml.safe_dump(document))
    environment = {
        **os.environ,
        "DIST_FT_FAILPOINT": f"train.step:{kill_at + 1}@1",
        "DIST_FT_FAILPOINT_ONCE": str(kill_file),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_ft.cli", "train", str(path), "--skip-check"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    assert process.stdout is not None
    first_step_s, is_restarted, lines = None, False, []
    for line in process.stdout:
        lines.append(line)
        is_restarted |= "(attempt 2)" in line
        if is_restarted and first_step_s is None and line.startswith("step "):
            first_step_s = time.time()
    if process.wait() or first_step_s is None:
        raise SystemExit("".join(lines[-40:]))
    return first_step_s - kill_file.stat().st_mtime


if __name__ == "__main__":
    main()
