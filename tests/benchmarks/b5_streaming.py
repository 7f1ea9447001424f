"""B5: MB/s of tokens from object storage to batches: dist_ft / raw ranged GET and four peers.

    tests/benchmarks/peers.sh                # once: an environment for the peers
    python tests/benchmarks/b5_streaming.py

An S3 server on loopback (moto), with its bandwidth capped by a proxy, and not capped (then server
and readers share the cores; raw GET shows the upper bound). Each side reads all samples once, in
its own process, from an empty cache, in the format that its authors recommend. dist_ft and
`datasets` read the same Parquet files. dist_ft builds whole batches (shuffled, with positions and
targets); the peers only yield samples in order.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
PEERS = ("mosaic", "litdata", "webdataset", "datasets")
RANGE_BYTES, IN_FLIGHT = 4 * 2**20, 4


def main() -> None:
    """Measure, print the tables, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=30_000, help="samples of 2,800 bytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cap-mb-s", type=float, default=10)
    parser.add_argument("--peers-python", default=str(HERE / ".peers" / "bin" / "python"))
    parser.add_argument("--out", help="JSON file to write instead of results/b5_streaming.json")
    parser.add_argument("--read", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read_ours(*args.read)
        return
    harness.require_one_thread()
    environment = harness.describe_environment()
    import s3
    import tiny
    from proxy import FaultyProxy

    os.environ.update(s3.CREDENTIALS)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="dist_ft-b5-") as name, s3.server() as port:
        folder, direct = Path(name), f"http://127.0.0.1:{port}"
        tiny.make_model(folder / "model")
        for peer in ("parquet", "mosaic", "litdata", "webdataset"):
            run_peer(args, "write", peer, direct, folder)
        run([sys.executable, __file__, "--read", direct, str(folder), "index"])
        proxy = FaultyProxy(port)
        proxy.bytes_per_s = args.cap_mb_s * 1e6
        for label, endpoint, rounds in (
            ("capped", proxy.url, max(2, args.rounds // 2)),
            ("uncapped", direct, args.rounds),
        ):
            sides = {
                "ours": lambda url=endpoint: rate(
                    run([sys.executable, __file__, "--read", url, str(folder), "read"])
                ),
                "raw": lambda url=endpoint: raw(url, direct, args.samples * 2800),
                **{
                    peer: lambda url=endpoint, peer=peer: rate(
                        run_peer(args, "read", peer, url, folder)
                    )
                    for peer in PEERS
                },
            }
            mb_s = harness.alternate_sides(sides, rounds)
            result[label] = {
                "mb_s": mb_s,
                **{
                    f"ours_over_{side}": harness.ratio(mb_s["ours"], mb_s[side])
                    for side in mb_s
                    if side != "ours"
                },
            }
        proxy.close()
    report(result, args)
    config = {
        "samples": args.samples,
        "bytes": args.samples * 2800,
        "cap_mb_s": args.cap_mb_s,
        "rounds": args.rounds,
        "peers": versions(args.peers_python),
    }
    harness.save_results("b5_streaming", config, environment, result, args.out)


def run(command: list[str]) -> str:
    """Run a side and return its output; exit if it fails."""
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{process.stdout[-2000:]}{process.stderr[-3000:]}")
    return process.stdout


def run_peer(args: argparse.Namespace, action: str, name: str, url: str, folder: Path) -> str:
    """Run a peer in its own environment."""
    python = sys.executable if name == "parquet" else args.peers_python
    return run(
        [python, str(HERE / "b5_peers.py"), action, name, url, str(folder), str(args.samples)]
    )


def rate(output: str) -> float:
    """Return the MB/s of the line that a side printed."""
    _, total, seconds = next(
        line for line in output.splitlines() if line.startswith("read ")
    ).split()
    return float(total) / float(seconds) / 1e6


def versions(python: str) -> dict[str, str]:
    """Return the versions of the peers."""
    code = (
        "from importlib.metadata import version as v\n"
        "for n in ('mosaicml-streaming', 'litdata', 'webdataset', 'datasets'): print(n, v(n))"
    )
    return dict(line.split() for line in run([python, "-c", code]).splitlines())


def read_ours(url: str, folder_path: str, action: str) -> None:
    """Read all samples once through a run's loader; action "index" only builds the run's index."""
    import shutil

    import pyarrow.parquet  # noqa: F401  # imported before the clock starts, as by each peer
    import s3
    import s3fs  # noqa: F401
    import tiny

    from dist_ft.config.load import load_config
    from dist_ft.core.world import Collectives, World
    from dist_ft.runtime.bootstrap.build_data import build_training_loader
    from dist_ft.runtime.bootstrap.resolve_run import resolve_run
    from dist_ft.storage import filesystem
    from dist_ft.storage.filesystem import Store

    folder = Path(folder_path)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    config = load_config(
        tiny.config(
            folder,
            "streaming",
            storage={"options": {"s3": {"endpoint_url": url}}},
            schedule={"epochs": 1},
            data={
                "train": f"s3://{s3.BUCKET}/parquet/*.parquet",
                "format": "auto",
                "overlong": "truncate",
                "block_mib": 4,
                "shuffle_blocks": 1,
                "cache_dir": str(folder / "cache"),
                "tokenizer_processes": 0,
            },
            batch={"global_batch": 8, "micro_batch": 8, "sequence_length": 2100},
        )
    )
    filesystem.configure(config.storage.options)
    store, world, comms = Store(config.run_url), World(), Collectives()
    run = resolve_run(config, store, world, comms)
    loader = build_training_loader(run, store, world, comms)
    if action == "index":
        return
    start_s, total = time.perf_counter(), 0
    for batches in loader.iterate(0, loader.steps_per_epoch, range(1)):
        total += sum(batch.num_tokens for batch in batches) * 4
    print(f"\nread {total} {time.perf_counter() - start_s}", flush=True)


def raw(url: str, direct: str, num_bytes: int) -> float:
    """Return MB/s of tokens of parallel ranged GETs of the same Parquet files, without decoding."""
    import http.client

    import boto3
    import s3

    keys = boto3.client("s3", endpoint_url=direct).list_objects_v2(
        Bucket=s3.BUCKET, Prefix="parquet/"
    )["Contents"]
    ranges = [
        (key["Key"], start, min(key["Size"], start + RANGE_BYTES) - 1)
        for key in keys
        for start in range(0, key["Size"], RANGE_BYTES)
    ]
    host = url.removeprefix("http://")

    def get(byte_range: tuple[str, int, int]) -> int:
        key, first, last = byte_range
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("GET", f"/{s3.BUCKET}/{key}", headers={"Range": f"bytes={first}-{last}"})
        size = len(connection.getresponse().read())
        connection.close()
        return size

    start_s = time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        sum(threads.map(get, ranges))
    return num_bytes / (time.perf_counter() - start_s) / 1e6


def report(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the results."""
    rows = []
    for label, measured in result.items():
        for side, values in measured["mb_s"].items():
            if side == "ours":
                rows.append((label, side, f"{np.mean(values):.1f}", "", ""))
                continue
            goal = 0.95 if side == "raw" else 1.0
            ratio = measured[f"ours_over_{side}"]
            # the link limits the raw side, the readers limit the others
            has_goal = label == ("capped" if side == "raw" else "uncapped")
            rows.append(
                (
                    label,
                    side,
                    f"{np.mean(values):.1f}",
                    str(ratio),
                    harness.format_goal(ratio, goal, at_least=True) if has_goal else "",
                )
            )
    harness.print_table(
        f"B5 streaming of {args.samples * 2800 / 1e6:.0f} MB of tokens, cap {args.cap_mb_s:g} MB/s",
        ("link", "side", "MB/s", "ours / side [95 %]", "goal"),
        rows,
    )


if __name__ == "__main__":
    main()
