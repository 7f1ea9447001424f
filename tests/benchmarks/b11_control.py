"""B11: the cost of control work at 1,024 to 16,384 simulated ranks over 100 M samples.

    python tests/benchmarks/b11_control.py

For a rank: find the sequences of its lane at a step without cached order (order of blocks, window,
position), and pack their block. For a commit: unpickle the file entries of every rank, as the
receiver of a gloo gather does, build the manifest with its checksum, write it. One rank is
simulated at a time; nothing is sent.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import workload

SAMPLES, SAMPLE_BYTES, BLOCK_BYTES, LENGTH = 100_000_000, 1400, 16 * 2**20, 2048
RANKS = (1024, 4096, 16384)
FILES_PER_RANK = 4
GOAL_RANK_MS, GOAL_COMMIT_S = 50, 1.0


def main() -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=15, help="number of step lookups")
    parser.add_argument("--out", help="JSON file to write instead of results/b11_control.json")
    args = parser.parse_args()
    harness.require_one_thread()
    environment = harness.describe_environment()
    rows_per_block = BLOCK_BYTES // SAMPLE_BYTES
    lengths = workload.lognormal_lengths(rows_per_block, seed=0)
    pack_ms = median_ms(lambda: pack(lengths), args.repeats)
    results: dict[str, Any] = {"pack_block_ms": pack_ms, "blocks": SAMPLES // rows_per_block}
    rows = []
    for ranks in RANKS:
        result = measure(ranks, lengths, args.repeats)
        results[str(ranks)] = result
        rank_ms = result["cold_step_ms"] + pack_ms
        rows.append(
            (
                f"{ranks:,}",
                f"{result['cold_step_ms']:.1f}",
                f"{result['warm_step_ms']:.2f}",
                f"{pack_ms:.1f}",
                f"{rank_ms:.1f}",
                "reached" if rank_ms <= GOAL_RANK_MS else "missed",
                f"{result['commit_s']:.2f}",
                "reached" if result["commit_s"] <= GOAL_COMMIT_S else "missed",
            )
        )
    harness.print_table(
        f"B11 control work, {SAMPLES:,} samples in {results['blocks']:,} blocks (medians)",
        (
            "ranks",
            "step, cold ms",
            "step, warm ms",
            "pack one block ms",
            "per rank ms",
            f"≤ {GOAL_RANK_MS} ms",
            "commit s",
            f"≤ {GOAL_COMMIT_S:g} s",
        ),
        rows,
    )
    config = {
        "samples": SAMPLES,
        "sample_bytes": SAMPLE_BYTES,
        "block_bytes": BLOCK_BYTES,
        "sequence_length": LENGTH,
        "files_a_rank": FILES_PER_RANK,
        "repeats": args.repeats,
    }
    harness.save_results("b11_control", config, environment, results, args.out)


def pack(lengths: np.ndarray) -> Any:
    """Pack one block, as in an epoch; `lengths` (N,): tokens of its samples."""
    from dist_ft.data.sampling.packing import group_into_sequences

    return group_into_sequences(lengths, LENGTH, True, 1)


def median_ms(action: Callable[[], Any], repeats: int) -> float:
    """Return the median time of an action in milliseconds."""
    times = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        action()
        times.append((time.perf_counter() - start_s) * 1e3)
    return statistics.median(times)


def measure(ranks: int, lengths: np.ndarray, repeats: int) -> dict[str, float]:
    """Return the costs with `ranks` ranks of one lane each."""
    from dist_ft.config.schema import BatchSection, DataSection
    from dist_ft.data.sampling.batch_plan import BatchPlan

    blocks = SAMPLES // len(lengths)
    counts = np.full(blocks, len(pack(lengths)[1]) - 1)
    batch = BatchSection(global_batch=ranks, micro_batch=1, sequence_length=LENGTH)
    data = DataSection.model_validate({"train": "unused"})
    cold, warm = [], []
    for number in range(repeats):
        plan = BatchPlan(counts, np.zeros(blocks, dtype=np.int64), data, batch, seed=number)
        step, lane = 37 * number, (911 * number) % ranks
        start_s = time.perf_counter()
        plan.sequence_refs(step, lane)
        cold.append((time.perf_counter() - start_s) * 1e3)
        start_s = time.perf_counter()
        plan.sequence_refs(step + 1, lane)
        warm.append((time.perf_counter() - start_s) * 1e3)
    return {
        "cold_step_ms": statistics.median(cold),
        "warm_step_ms": statistics.median(warm),
        "commit_s": commit_seconds(ranks),
    }


def commit_seconds(ranks: int) -> float:
    """Return the median seconds of rank 0 from the pickled entries to a written manifest."""
    from dist_ft.checkpoint import manifest as manifests
    from dist_ft.checkpoint.manifest import FileEntry, Manifest, Progress, TensorInfo
    from dist_ft.storage.filesystem import Store

    checksum, size = "xxh3_128:" + "0" * 32, 2**26
    fields = {
        "num_bytes": size,
        "checksum": checksum,
        "block_bytes": manifests.BLOCK_BYTES,
        "blocks": "0" * 16 * (size // manifests.BLOCK_BYTES),
    }
    pickled_entries = [
        pickle.dumps(
            [
                FileEntry(path=f"rank-{rank:05d}-{part:04d}.safetensors", **fields)
                for part in range(FILES_PER_RANK)
            ]
        )
        for rank in range(ranks)
    ]
    tensors = {f"model.layers.{i}.weight": TensorInfo(shape=(8192, 8192)) for i in range(1200)}
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(5):
            start_s = time.perf_counter()
            entries = [entry for part in pickled_entries for entry in pickle.loads(part)]
            manifest = Manifest(
                format_version=manifests.FORMAT_VERSION,
                run="r",
                attempt=1,
                world_size=ranks,
                engine="DeepSpeedEngine",
                progress=Progress(step=1, optimizer_step=1),
                tensors=tensors,
                aliases={},
                files=tuple(entries),
            )
            Store(folder).write(manifests.NAME, manifests.serialize_manifest(manifest))
            times.append(time.perf_counter() - start_s)
    return statistics.median(times)


if __name__ == "__main__":
    main()
