"""Promise 1 on the loader alone: three sources mixed and packed, runs that stop anywhere and resume in any world.

Workers are played one after the other in this process, each with its own lanes; what they feed goes through the real
ledger, and what was not committed is lost, as it is when a run dies.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny
from resolved import loaders
from unit.checkpoint.test_manifest import make

from dist_ft.checkpoint.ledger import LedgerBuffer, read_ledger, write_segment
from dist_ft.checkpoint.manifest import Progress
from dist_ft.config.load import load_config
from dist_ft.core.world import World
from dist_ft.storage.filesystem import Store

WORLDS = (4, 3, 8, 1, 5)
LANES = 16


def write_tokens(folder: Path, num_samples: int, num_shards: int, seed: int) -> str:
    """Write samples of 2 to 40 tokens as Parquet shards of tokens and return their folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for shard, count in enumerate(
        np.diff(np.linspace(0, num_samples, num_shards + 1).astype(int)).tolist()
    ):
        offsets = np.concatenate([[0], np.cumsum(rng.integers(2, 41, count))])
        ids = pa.array(rng.integers(4, 256, int(offsets[-1])).astype(np.int32))
        column = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), ids)
        pyarrow.parquet.write_table(
            pa.table({"input_ids": column}),
            folder / f"part-{shard:05d}.parquet",
            row_group_size=2000,
        )
    return str(folder)


def document(base: Path, samples: int, shards: int) -> dict:
    """Return a run over three sources of 5, 3 and 2 tenths of the samples, in two epochs."""
    parts = [(5, 0), (3, 1), (2, 2)]
    train = [
        {
            "path": write_tokens(
                base / f"source-{seed}", samples * share // 10, shards * share // 10, seed
            ),
            "name": f"source-{seed}",
        }
        for share, seed in parts
    ]
    return tiny.config(
        base,
        "once",
        data={"train": train, "format": "auto", "block_mib": 0.25, "shuffle_blocks": 8},
        batch={"global_batch": 4 * LANES, "micro_batch": 4, "sequence_length": 256},
        schedule={"epochs": 2},
    )


def segment_rows(batches: list) -> np.ndarray:
    """Return the segments (n, 5) of batches of one step with their lane, in the ledger's order."""
    rows = np.concatenate(
        [
            np.column_stack([np.full(len(b.segments), b.lane), b.segments[:, [3, 0, 1, 2]]])
            for b in batches
        ]
    )
    return rows[np.lexsort((rows[:, 3], rows[:, 2], rows[:, 0]))]


@pytest.mark.parametrize(
    ("samples", "shards"),
    [
        (40_000, 40),
        pytest.param(1_000_000, 200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_promise_1_every_sample_once_through_stops_and_resizes(
    tmp_path: Path, samples: int, shards: int
) -> None:
    tiny.make_model(tmp_path / "model")
    config = load_config(document(tmp_path, samples, shards))
    store = Store(str(tmp_path / "run"))
    unbroken = loaders(config, store).training
    total = unbroken.plan.total_steps(config.schedule)
    expected = [segment_rows(batches) for batches in unbroken.iterate(0, total, range(LANES))]
    assert sum(map(len, expected)) == 2 * unbroken.index.total("num_segments")

    drawn = random.Random(7)
    stops = sorted(drawn.sample(range(1, total), 10))
    segments, committed, attempt = [], 0, 0
    while committed < total:
        world = WORLDS[attempt % len(WORLDS)]
        dies_at = stops[attempt] if attempt < len(stops) else total
        per_rank = [loaders(config, store).training for _ in range(world)]
        streams = [
            loader.iterate(committed, total, World(rank, world).share(LANES))
            for rank, loader in enumerate(per_rank)
        ]
        buffers = [LedgerBuffer() for _ in range(world)]
        commit_at = dies_at if attempt >= len(stops) else drawn.randint(committed, dies_at)
        for step in range(committed, dies_at):
            for stream, buffer in zip(streams, buffers, strict=True):
                buffer.add(step, next(stream))
            if step + 1 == commit_at:
                rows = [buffer.take() for buffer in buffers]
                segments.append(write_segment(store, committed, commit_at, attempt, rows))
        for stream, loader in zip(streams, per_rank, strict=True):
            stream.close()
            loader.store.close()
        committed, attempt = commit_at, attempt + 1
    assert attempt == 11

    segments = [segment for segment in segments if segment.stop > segment.start]
    ledger = read_ledger(
        store, make(ledger=tuple(segments), progress=Progress(step=total, optimizer_step=0))
    )
    edges = np.searchsorted(ledger[:, 0], np.arange(total + 1))
    for step in range(total):
        found = ledger[edges[step] : edges[step + 1]][:, [2, 1, 3, 4, 5]]
        assert np.array_equal(
            found[np.lexsort((found[:, 3], found[:, 2], found[:, 0]))], expected[step]
        ), f"step {step}"
    for epoch in range(2):
        own = ledger[ledger[:, 1] == epoch]
        assert len(np.unique(own[:, 3])) == len(own) == samples, f"epoch {epoch}: {len(own)} rows"
