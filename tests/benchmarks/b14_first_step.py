"""B14: time to the end of the first step over 2 MB, 200 MB and 20 GB of data; requests and bytes.

    python tests/benchmarks/b14_first_step.py

JSON Lines and Parquet on an S3 server on loopback that computes its objects (`virtual_bucket`). Each
start is a fresh process with an empty token cache: 8 lanes of 512 tokens, a tiny model. The time is
that from the start of the process to its line of step 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import harness
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
SIZES = {"2 MB": 2_000_000, "200 MB": 200_000_000, "20 GB": 20_000_000_000}
TIMEOUT_S = 600
REPEATED_BYTES = 1_000_000
SMALL_PARQUET_BYTES = 2_000_000
PARQUET_BYTES = 20_000_000


def main() -> None:
    """Measure, print the tables, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--formats", nargs="+", default=["jsonl", "parquet"])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--out", help="JSON file to write instead of results/b14_first_step.json")
    args = parser.parse_args()
    harness.require_one_thread()
    environment = harness.describe_environment()

    with tempfile.TemporaryDirectory(prefix="dist_ft-b14-") as name:
        folder = Path(name)
        make_inputs(folder)
        server, port = start_server(folder)
        try:
            sections = {kind: measure(kind, args, folder, port) for kind in args.formats}
        finally:
            server.kill()
            server.wait()
    settings = {"rounds": args.rounds, "sizes": args.sizes}
    harness.save_results("b14_first_step", settings, environment, sections, args.out)


def make_inputs(folder: Path) -> None:
    """Write a tiny model, and the rows that the server repeats."""
    import pyarrow
    import pyarrow.parquet
    import tiny

    tiny.make_model(folder / "model", positions=512)
    rng = random.Random(0)
    lines = []
    num_bytes = 0
    while num_bytes < REPEATED_BYTES:
        words = rng.choices(tiny.WORDS, k=max(3, int(rng.lognormvariate(4.2, 0.9))))
        line = json.dumps({"text": " ".join(words)}) + "\n"
        lines.append(line)
        num_bytes += len(line)
    (folder / "rows.jsonl").write_text("".join(lines))

    rows = [json.loads(line) for line in lines]
    for name, num_bytes in (("small", SMALL_PARQUET_BYTES), ("rows", PARQUET_BYTES)):
        table = pyarrow.Table.from_pylist(rows * (num_bytes // REPEATED_BYTES))
        pyarrow.parquet.write_table(
            table,
            folder / f"{name}.parquet",
            row_group_size=2000,
            compression="none",
            use_dictionary=False,
        )


def start_server(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start the server; return its process and port."""
    import ports

    port = ports.find_free_port()
    script = Path(__file__).with_name("virtual_bucket.py")
    server = subprocess.Popen([sys.executable, str(script), str(port), str(folder)])
    for _ in range(100):
        try:
            counts(port)
            return server, port
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not start")


def counts(port: int) -> dict[str, list[int]]:
    """Return what was requested since the last call: kind -> [requests, bytes]."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/counts") as answer:
        return json.load(answer)


def measure(kind: str, args: argparse.Namespace, folder: Path, port: int) -> dict[str, Any]:
    """Return seconds, requests and ratios of one format."""
    seconds: dict[str, list[float]] = {size: [] for size in args.sizes}
    requests: dict[str, dict[str, list[int]]] = {}
    for number in range(args.rounds):
        for size in harness.side_order(args.sizes, number):
            counts(port)
            seconds[size].append(first_step(kind, SIZES[size], folder, port))
            requests[size] = counts(port)
            print(f"{kind}, round {number + 1}: {size} {seconds[size][-1]:.2f} s", flush=True)

    smallest = args.sizes[0]
    ratios = {size: harness.ratio(seconds[size], seconds[smallest]) for size in args.sizes[1:]}
    print(f"\n{kind}: time to step 1 / that over {smallest}")
    for size, value in ratios.items():
        print(f"  {size}: {value}")
    for size, found in requests.items():
        text = ", ".join(f"{n} {name} ({b / 1e6:.2f} MB)" for name, (n, b) in found.items())
        print(f"  {size}: {text}")
    return {"seconds": seconds, "ratios": ratios, "requests": requests}


def first_step(kind: str, size: int, folder: Path, port: int) -> float:
    """Return the seconds from the start of a run to its line of step 1."""
    for name in ("runs", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config(kind, size, folder, port)))
    environment = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": "testing-testing",
        "AWS_SECRET_ACCESS_KEY": "testing-testing",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "dist_ft.cli", "train", str(path), "--skip-check"]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step"):
                return time.perf_counter() - started
            if time.perf_counter() - started > TIMEOUT_S:
                break
    finally:
        process.kill()
        process.wait()
    raise SystemExit("no step:\n" + "".join(lines[-20:]))


def config(kind: str, size: int, folder: Path, port: int) -> dict[str, Any]:
    """Return the run."""
    endpoint = f"http://127.0.0.1:{port}"
    return {
        "run": {"name": "first", "storage": str(folder / "runs"), "seed": 1},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "train": f"s3://virtual/{kind}/{size}/*.{kind}",
            "format": "text",
            "overlong": "truncate",
            "bad_rows": "skip",
            "cache_dir": str(folder / "cache"),
        },
        "batch": {"global_batch": 8, "micro_batch": 1, "sequence_length": 512},
        "schedule": {"steps": 1000, "warmup_steps": 0},
        "optimizer": {"learning_rate": 1e-4},
        "log": {"every_steps": 1},
        "storage": {"options": {"s3": {"endpoint_url": endpoint}}},
    }


if __name__ == "__main__":
    main()
