"""Resume of a streamed run at 1 % and 99 % of an epoch of 10 M samples: requests, bytes, CPU seconds.

    python tests/benchmarks/b14_resume.py

JSON Lines on an S3 server on loopback that computes its objects (`virtual_bucket`). A worker of 4, 3
or 8 starts with an empty token cache from cursors at either position, and assembles its first batch.
What imports cost is left out: the clock starts when the loader is built. At the end: peak memory of a
process that reads steps at three places of 10 M samples / of 100,000 samples.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import b14_first_step as first_step
import harness
from b14_listing import peak_mib

WORLDS = (4, 3, 8)
LANES = 8
POSITIONS = (0.01, 0.99)
MAX_REQUESTS = 10
GOAL = 1.1


def main() -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150, help="steps at each place, for memory")
    parser.add_argument("--out", help="JSON file to write instead of results/b14_resume.json")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        start(json.loads(args.start))
        return
    environment = harness.describe_environment()

    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="dist_ft-b14-") as name:
        folder = Path(name)
        first_step.make_inputs(folder)
        rows = (folder / "rows.jsonl").read_bytes()
        size = round(args.samples / rows.count(b"\n") * len(rows))
        server, port = first_step.start_server(folder)
        try:
            settings = {"folder": name, "port": port, "size": size}
            run({**settings, "kind": "describe"})
            for number in range(args.rounds):
                for world in WORLDS:
                    for position in harness.side_order([str(p) for p in POSITIONS], number):
                        values = {"world": world, "position": float(position)}
                        values["kind"] = "resume"
                        found.append({**values, **run({**settings, **values})})
                        print(found[-1], flush=True)
            memory = measure_memory(settings, args)
        finally:
            server.kill()
            server.wait()

    report(found, memory, environment, args)


def measure_memory(settings: dict[str, Any], args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the peak MiB of processes that read a large and a small source, by round."""
    peaks: dict[str, list[float]] = {"large": [], "small": []}
    for number in range(args.rounds):
        for name in harness.side_order(list(peaks), number):
            size = settings["size"] // (1 if name == "large" else 100)
            own = {**settings, "size": size, "kind": "memory", "steps": args.steps}
            peaks[name].append(run(own)["peak_mib"])
            print(f"{name}: {peaks[name][-1]:.1f} MiB", flush=True)
    return peaks


def report(
    found: list[dict[str, Any]],
    memory: dict[str, list[float]],
    environment: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Print and store the results."""
    most = max(one["requests"] for one in found)
    cursor = max(one["cursor_bytes"] for one in found)
    print(f"\nrequests of a rank: at most {most} (goal: {MAX_REQUESTS})")
    print(f"bytes of a cursor: {cursor} (goal: at most 64)")

    ratios = {}
    for kind in ("bytes", "cpu_s", "seconds"):
        late, early = (
            [one[kind] for one in found if one["position"] == position]
            for position in reversed(POSITIONS)
        )
        ratios[kind] = harness.ratio(late, early)
        print(f"{kind} at 99 % / at 1 %: {ratios[kind]}")
    ratios["memory"] = harness.ratio(memory["large"], memory["small"])
    print(f"peak memory of {args.samples:,} / {args.samples // 100:,} samples: {ratios['memory']}")
    result = {
        "starts": found,
        "memory": memory,
        "ratios": ratios,
        "most_requests": most,
        "cursor_bytes": cursor,
    }
    settings = {"samples": args.samples, "rounds": args.rounds, "worlds": WORLDS}
    harness.save_results("b14_resume", settings, environment, result, args.out)


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Start a worker; return what it measured, and what was requested until its first batch."""
    shutil.rmtree(Path(settings["folder"]) / "cache", ignore_errors=True)
    environment = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": "testing-testing",
        "AWS_SECRET_ACCESS_KEY": "testing-testing",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    first_step.counts(settings["port"])
    ended = subprocess.run(
        [sys.executable, __file__, "--start", json.dumps(settings)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    if ended.returncode:
        raise SystemExit(ended.stderr)
    return json.loads(ended.stdout.splitlines()[-1])


def start(settings: dict[str, Any]) -> None:
    """Build the loader of one rank and do what `settings` say; print what was measured."""
    import numpy as np
    from resolved import loaders

    from dist_ft.config.load import load_config
    from dist_ft.core.world import World
    from dist_ft.data.sampling.stream_order import StreamOrder
    from dist_ft.storage import filesystem
    from dist_ft.storage.filesystem import Store

    folder, port = Path(settings["folder"]), settings["port"]
    config = load_config(first_step.config("jsonl", settings["size"], folder, port))
    filesystem.configure(config.storage.options)
    started, cpu = time.perf_counter(), time.process_time()
    loader = loaders(config, Store(str(folder / f"run-{settings['size']}"))).training
    layout = loader.store.slices.layouts[0]
    order = StreamOrder(layout, LANES, 0, config.data.shuffle_blocks)

    def cursors_at(position: float) -> np.ndarray:
        rows = []
        for lane in range(LANES):
            first = int(position * order.num_slices(lane, 0))
            rows.append([lane, 0, 0, first - first % layout.slices_per_block, 5, 7])
        return np.array(rows, dtype=np.int64)

    if settings["kind"] == "describe":
        loader.close()
        print("{}")
        return

    if settings["kind"] == "memory":
        for position in (0.0, 0.5, 0.98):
            loader.restore(0, cursors_at(position))
            steps = loader.iterate(0, settings["steps"], range(LANES))
            for _ in steps:
                loader.take_facts()
        loader.close()
        print(json.dumps({"peak_mib": peak_mib()}))
        return

    cursors = cursors_at(settings["position"])
    loader.restore(1000, cursors)
    # without the thread that reads ahead: its requests would be counted or not, by chance
    loader.batches(1000, World(0, settings["world"]).share(LANES))

    values = {
        "seconds": round(time.perf_counter() - started, 3),
        "cpu_s": round(time.process_time() - cpu, 3),
        "cursor_bytes": (cursors.shape[1] - 2) * cursors.itemsize,
    }
    requests = first_step.counts(port)
    values["requests"] = sum(number for number, _ in requests.values())
    values["bytes"] = sum(num_bytes for _, num_bytes in requests.values())
    loader.close()
    print(json.dumps(values))


if __name__ == "__main__":
    main()
