"""B6: time to the first batch at 1 % and 99 % of an epoch, on 4, 3 and 8 workers; requests; memory.

    python tests/benchmarks/b6_resume.py

10 M samples as Parquet shards of tokens on an S3 server on loopback (moto), behind a proxy that
counts requests. The index is built once. Then a worker of 4, 3 or 8 starts with an empty cache at
either
position: it lists the data, reads the index, finds the blocks of its lanes and assembles the first
    batch.
At the end: peak memory of a process that reads 10 M samples / of one that reads 100,000 with the
same settings.
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

import harness
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
WORLDS = (4, 3, 8)
LANES = 8
SMALL = 100_000


def main() -> None:
    """Measure, print the tables, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument(
        "--repeats", type=int, default=4, help="starts at each position and number of workers"
    )
    parser.add_argument("--steps", type=int, default=5000, help="steps of the memory measurement")
    parser.add_argument("--out", help="JSON file to write instead of results/b6_resume.json")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        read_steps(json.loads(args.memory_of), args.steps)
        return
    harness.require_one_thread()
    environment = harness.describe_environment()
    import s3
    import tiny
    from proxy import FaultyProxy

    os.environ.update(s3.CREDENTIALS)
    with tempfile.TemporaryDirectory(prefix="dist_ft-b6-") as name, s3.server() as port:
        folder, proxy = Path(name), FaultyProxy(port)
        tiny.make_model(folder / "model")
        s3.reset_options(options(f"http://127.0.0.1:{port}"))
        for count in (SMALL, args.samples):
            upload(f"s3://{s3.BUCKET}/{count}", count)
        result: dict[str, Any] = {"first_ever_s": build_index(folder, port, args.samples)}
        build_index(folder, port, SMALL)
        result |= resume(folder, proxy, args)
        result["memory"] = {
            str(count): peak_mib(folder, port, count, args.steps) for count in (SMALL, args.samples)
        }
        proxy.close()
    report(result, args)
    config = {
        "samples": args.samples,
        "lanes": LANES,
        "worlds": WORLDS,
        "repeats": args.repeats,
        "steps": args.steps,
        "block_mib": 0.25,
        "shuffle_blocks": 1,
        "sequence_length": 256,
    }
    harness.save_results("b6_resume", config, environment, result, args.out)


def options(url: str) -> dict[str, Any]:
    """Return the fsspec options for the server."""
    return {"s3": {"endpoint_url": url}}


def upload(url: str, count: int) -> None:
    """Write samples of 8 to 24 tokens as shards of 100,000."""
    import io

    import pyarrow as pa
    import pyarrow.parquet

    from dist_ft.storage.filesystem import Store

    rng = np.random.default_rng(count)
    for shard in range(-(-count // 100_000)):
        offsets = np.concatenate([[0], np.cumsum(rng.integers(8, 25, 100_000))])
        ids = rng.integers(4, 256, int(offsets[-1])).astype(np.int32)
        table = pa.table(
            {"input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(ids))}
        )
        sink = io.BytesIO()
        pyarrow.parquet.write_table(table, sink, row_group_size=4000, compression="none")
        Store(url).write(f"part-{shard:05d}.parquet", sink.getvalue())


def load_run_config(folder: Path, url: str, count: int, cache: str) -> Any:
    """Return the config of a run over `count` samples."""
    import s3
    import tiny

    from dist_ft.config.load import load_config

    return load_config(
        tiny.config(
            folder,
            f"n{count}",
            storage={"options": options(url)},
            schedule={"epochs": 1},
            data={
                "train": f"s3://{s3.BUCKET}/{count}/*.parquet",
                "format": "auto",
                "block_mib": 0.25,
                "shuffle_blocks": 1,
                "cache_dir": str(folder / cache),
                "tokenizer_processes": 0,
            },
            batch={"global_batch": LANES, "micro_batch": 1, "sequence_length": 256},
        )
    )


def open_loader(config: Any) -> Any:
    """Return the training loader of a run."""
    from dist_ft.core.world import Collectives, World
    from dist_ft.runtime.bootstrap.build_data import build_training_loader
    from dist_ft.runtime.bootstrap.resolve_run import resolve_run
    from dist_ft.storage import filesystem
    from dist_ft.storage.filesystem import Store

    filesystem.configure(config.storage.options)
    store, world, comms = Store(config.run_url), World(), Collectives()
    run = resolve_run(config, store, world, comms)
    return build_training_loader(run, store, world, comms)


def build_index(folder: Path, port: int, count: int) -> float:
    """Build the index of a run and return the seconds to its first batch."""
    start_s = time.perf_counter()
    loader = open_loader(load_run_config(folder, f"http://127.0.0.1:{port}", count, "first"))
    next(loader.iterate(0, 1, range(LANES)))
    return time.perf_counter() - start_s


def resume(folder: Path, proxy: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Return seconds and requests until the first batch of a worker, by position in the epoch."""
    import s3

    from dist_ft.core.world import World

    s3.reset_options(options(proxy.url))
    config = load_run_config(folder, proxy.url, args.samples, "empty")
    seconds: dict[str, list[float]] = {"1 %": [], "99 %": []}
    requests: dict[str, list[int]] = {"1 %": [], "99 %": []}
    for number in range(args.repeats):
        for world in WORLDS:
            for position in harness.side_order(list(seconds), number):
                shutil.rmtree(folder / "empty", ignore_errors=True)
                s3.reset_options(options(proxy.url))
                proxy.requests.clear()
                start_s = time.perf_counter()
                loader = open_loader(config)
                step = loader.steps_per_epoch * int(position.split()[0]) // 100
                loader.batches(step, World(0, world).share(LANES))
                seconds[position].append(time.perf_counter() - start_s)
                requests[position].append(len(proxy.requests))
                loader.store.close()
    return {
        "seconds": seconds,
        "requests": requests,
        "late_over_early": harness.ratio(seconds["99 %"], seconds["1 %"]),
    }


def peak_mib(folder: Path, port: int, count: int, steps: int) -> float:
    """Return the peak memory in MiB of a new process that reads `steps` steps."""
    settings = json.dumps(
        {"folder": str(folder), "url": f"http://127.0.0.1:{port}", "count": count}
    )
    process = subprocess.run(
        [sys.executable, __file__, "--memory-of", settings, "--steps", str(steps)],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(process.stdout.split()[-1])


def read_steps(settings: dict[str, Any], steps: int) -> None:
    """Read `steps` steps at ten positions of the epoch, and print the peak memory in MiB."""
    loader = open_loader(
        load_run_config(Path(settings["folder"]), settings["url"], settings["count"], "first")
    )
    total = loader.steps_per_epoch
    for number in range(10):
        start = total * number // 10
        for _ in loader.iterate(start, start + steps // 10, range(LANES)):
            pass
    # getrusage would include the parent that this process was forked from
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def report(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the results."""
    late = result["late_over_early"]
    max_requests = max(map(max, result["requests"].values()))
    workers = ", ".join(map(str, WORLDS))
    harness.print_table(
        f"B6 first batch of {args.samples:,} samples, for one worker of {workers}",
        ("", "1 %", "99 %", "99 % / 1 % [95 %]", "goal"),
        [
            (
                "seconds (mean)",
                *(f"{np.mean(values):.2f}" for values in result["seconds"].values()),
                str(late),
                harness.format_goal(late, 1.05, at_least=False),
            ),
            (
                "requests (max)",
                *(str(max(values)) for values in result["requests"].values()),
                "",
                f"≤ 10: {'reached' if max_requests <= 10 else 'missed'}",
            ),
        ],
    )
    small, large = result["memory"].values()
    harness.print_table(
        "peak memory of a process that loads data",
        (f"{SMALL:,} samples", f"{args.samples:,}", "ratio", "goal"),
        [
            (
                f"{small:.0f} MiB",
                f"{large:.0f} MiB",
                f"{large / small:.3f}",
                f"≤ 1.1: {'reached' if large <= 1.1 * small else 'missed'}",
            )
        ],
    )
    print(
        "seconds to the first batch of a new run, with building the index: "
        f"{result['first_ever_s']:.0f}"
    )


if __name__ == "__main__":
    main()
