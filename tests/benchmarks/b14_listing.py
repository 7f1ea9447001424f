"""Listing of a prefix with 10,000 and 1,000,000 objects: peak memory, seconds and requests.

    python tests/benchmarks/b14_listing.py

An S3 server on loopback computes the listing (`virtual_bucket`). Each listing is that of a run's first
start, in a process of its own that has imported what a worker imports: the shards become the table
that all processes map, and a slice is located in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import b14_first_step as first_step
import harness

GOAL = 1.1


def main() -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--counts", type=int, nargs=2, default=[10_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="JSON file to write instead of results/b14_listing.json")
    parser.add_argument("--list", nargs=2, metavar=("COUNT", "PORT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        list_shards(*map(int, args.list))
        return
    environment = harness.describe_environment()

    found: dict[int, list[dict[str, Any]]] = {count: [] for count in args.counts}
    with tempfile.TemporaryDirectory(prefix="dist_ft-b14-") as name:
        folder = Path(name)
        first_step.make_inputs(folder)
        server, port = first_step.start_server(folder)
        try:
            for number in range(args.rounds):
                for count in harness.side_order([str(count) for count in args.counts], number):
                    first_step.counts(port)
                    values = run(int(count), port)
                    values["requests"] = first_step.counts(port).get("list", [0, 0])[0]
                    found[int(count)].append(values)
                    print(f"round {number + 1}: {int(count):,} objects: {values}", flush=True)
        finally:
            server.kill()
            server.wait()

    small, large = args.counts
    memory = harness.ratio(
        [one["peak_mib"] for one in found[large]], [one["peak_mib"] for one in found[small]]
    )
    print(f"\npeak memory, {large:,} / {small:,} objects: {memory}")
    print(harness.format_goal(memory, GOAL, at_least=False))
    harness.save_results(
        "b14_listing",
        {"counts": args.counts, "rounds": args.rounds},
        environment,
        {"listings": found, "memory": memory},
        args.out,
    )


def run(count: int, port: int) -> dict[str, Any]:
    """Return seconds and peak memory of a listing in a process of its own."""
    command = [sys.executable, __file__, "--list", str(count), str(port)]
    environment = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": "testing-testing",
        "AWS_SECRET_ACCESS_KEY": "testing-testing",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    if ended.returncode:
        raise SystemExit(ended.stderr)
    return json.loads(ended.stdout.splitlines()[-1])


def peak_mib() -> float:
    """Return the peak memory of this process; `ru_maxrss` would be that of its parent."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def list_shards(count: int, port: int) -> None:
    """List, and print seconds and peak memory as JSON."""
    import dist_ft.runtime.bootstrap.training_run  # noqa: F401  # as in a worker
    from dist_ft.config.schema import Source
    from dist_ft.data.sources.discovery import iter_shards
    from dist_ft.data.sources.shard_table import ShardTable
    from dist_ft.runtime.bootstrap.stored_shards import SUFFIX, write_shards
    from dist_ft.storage import filesystem

    filesystem.configure({"s3": {"endpoint_url": f"http://127.0.0.1:{port}"}})
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        source = Source(path=f"s3://virtual/list/{count}/*.jsonl")
        checksum = write_shards(iter_shards([source]), Path(name))
        table = ShardTable(Path(name) / f"{checksum}{SUFFIX}")
        assert table.num_shards(0) == count
        middle = table.total_bytes(0) // 2
        assert table.locate(0, middle, middle + 10)
    values = {
        "seconds": round(time.perf_counter() - started, 2),
        "peak_mib": peak_mib(),
    }
    print(json.dumps(values))


if __name__ == "__main__":
    main()
