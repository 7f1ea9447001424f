"""Promise 1 on the streamed loader: three sources, runs that stop anywhere and resume in any world.

Workers are played one after the other in this process, each with its own lanes. What they read goes
through real ledger segments and cursors of real manifests; what was not committed is lost, as it is
when a run dies.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from resolved import loaders
from unit.checkpoint.test_manifest import make

from dist_ft.checkpoint.ledger import LedgerBuffer, read_history, write_segment
from dist_ft.checkpoint.manifest import Manifest, Progress, cursors_of, pack_cursors
from dist_ft.config.load import load_config
from dist_ft.config.schema import RunConfig
from dist_ft.core.world import World
from dist_ft.data.blocks import index_file, stream_file
from dist_ft.data.blocks.slices import SAMPLE_BITS
from dist_ft.runs.epoch_counts import count_stream_epochs
from dist_ft.runtime.bootstrap.build_stream import REST, STREAM
from dist_ft.storage.filesystem import Store

WORLDS = (4, 3, 8, 1, 5)
LANES = 8
LENGTH = 16
PARTS = (5, 3, 2)
"""Tenths of the samples in each source."""


def write_source(folder: Path, count: int, seed: int) -> str:
    """Write `count` rows of a few words in four shards and return their folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lengths = rng.integers(2, 13, count).tolist()
    for shard in range(4):
        with open(folder / f"part-{shard}.jsonl", "w") as file:
            for number in range(shard, count, 4):
                file.write(json.dumps({"text": f"{number} " + "the fox " * lengths[number]}) + "\n")
    return str(folder)


def document(base: Path, samples: int, weights: tuple[float, ...]) -> dict[str, Any]:
    """Return a run over three sources; the last one is so small that it is indexed."""
    train = []
    for number, tenths in enumerate(PARTS):
        count = 400 if number == 2 else samples * tenths // 10
        source: dict[str, Any] = {
            "path": write_source(base / f"source-{number}", count, number),
            "name": f"source-{number}",
        }
        if weights:
            source["weight"] = weights[number]
        train.append(source)
    return tiny.config(
        base,
        "once",
        data={
            "train": train,
            "format": "text",
            "overlong": "truncate",
            "bad_rows": "skip",
            "order": "streamed",
            "tokenizer_processes": 0,
            "block_mib": 0.25,
        },
        batch={"global_batch": 4 * LANES, "micro_batch": 4, "sequence_length": LENGTH},
        schedule={"epochs": None, "steps": 10**6},
    )


def segment_rows(batches: list[Any]) -> np.ndarray:
    """Return the segments (n, 5) of batches of one step with their lane, in the ledger's order."""
    rows = []
    for batch in batches:
        lanes = np.full(len(batch.segments), batch.lane)
        rows.append(np.column_stack([lanes, batch.segments[:, [3, 0, 1, 2]]]))
    found = np.concatenate(rows)
    return found[np.lexsort((found[:, 3], found[:, 2], found[:, 0]))]


def read_unbroken(config: RunConfig, store: Store, epochs: int) -> list[np.ndarray]:
    """Return the rows of each step until all lanes have passed `epochs` of the streamed sources."""
    loader = loaders(config, store).training
    steps = loader.iterate(0, 10**6, range(LANES))
    expected = []
    for batches in steps:
        expected.append(segment_rows(batches))
        cursors = loader.cursors()
        if cursors[cursors[:, 1] < 2, 2].min() >= epochs:
            break
    steps.close()
    loader.close()
    return expected


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param((), id="by-size"),
        pytest.param((1.0, 1.0, 0.1), id="weighted", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("samples", "epochs"),
    [(50_000, 1), pytest.param(1_000_000, 2, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])],
)
def test_promise_1_every_sample_once_through_stops_and_resizes(
    tmp_path: Path, samples: int, epochs: int, weights: tuple[float, ...]
) -> None:
    tiny.make_model(tmp_path / "model")
    config = load_config(document(tmp_path, samples, weights))
    store = Store(str(tmp_path / "run"))
    expected = read_unbroken(config, store, epochs)
    total = len(expected)

    drawn = random.Random(7)
    stops = sorted(drawn.sample(range(1, total), 10))
    manifest: Manifest | None = None
    committed = attempt = 0
    segments = []
    while committed < total:
        world = WORLDS[attempt % len(WORLDS)]
        dies_at = stops[attempt] if attempt < len(stops) else total
        commit_at = dies_at if attempt >= len(stops) else drawn.randint(committed, dies_at)
        per_rank = [loaders(config, store).training for _ in range(world)]
        steps = []
        for rank, loader in enumerate(per_rank):
            loader.restore(committed, cursors_of(manifest))
            steps.append(loader.iterate(committed, total, World(rank, world).share(LANES)))

        buffers = [LedgerBuffer() for _ in range(world)]
        for step in range(committed, dies_at):
            for own, loader, buffer in zip(steps, per_rank, buffers, strict=True):
                buffer.add(step, next(own), loader.take_facts())
            if step + 1 == commit_at:
                rows = [buffer.take() for buffer in buffers]
                segments.append(write_segment(store, committed, commit_at, attempt, rows))
                cursors = np.concatenate([loader.cursors() for loader in per_rank])
                manifest = make(
                    ledger=tuple(segments),
                    progress=Progress(step=commit_at, optimizer_step=0),
                    cursors=pack_cursors(cursors),
                )
                require_once(config, store, manifest)
        for own, loader in zip(steps, per_rank, strict=True):
            own.close()
            loader.close()
        committed, attempt = commit_at, attempt + 1
    assert attempt == 11 and manifest is not None

    history = read_history(store, manifest)
    ledger = history.samples
    edges = np.searchsorted(ledger[:, 0], np.arange(total + 1))
    for step in range(total):
        found = ledger[edges[step] : edges[step + 1]][:, [2, 1, 3, 4, 5]]
        in_order = found[np.lexsort((found[:, 3], found[:, 2], found[:, 0]))]
        assert np.array_equal(in_order, expected[step]), f"step {step}"

    counts = require_once(config, store, manifest)
    for number, tenths in enumerate(PARTS[:2]):
        own = [count for count in counts if count.source == f"source-{number}"]
        assert len(own) >= epochs
        for count in own[:epochs]:
            # every row is one segment, as rows are cut to a sequence
            assert count.num_seen == count.num_segments == samples * tenths // 10


def require_once(config: RunConfig, store: Store, manifest: Manifest) -> list[Any]:
    """Fail if a segment came twice in an epoch, or is missing from one that all lanes passed."""
    history = read_history(store, manifest)
    rows = history.samples
    _, times = np.unique(rows[:, [1, 3, 4]], axis=0, return_counts=True)
    assert times.max(initial=1) == 1
    description = stream_file.load(store, STREAM)
    rest = index_file.load(store, REST)
    assert description is not None and rest is not None
    counts = count_stream_epochs(history, description, rest, config, cursors_of(manifest))
    assert all(count.is_sound for count in counts), counts

    ids = Counter((rows[:, 3] >> SAMPLE_BITS == 0).tolist())
    assert ids[True] or manifest.progress.step < 40
    return counts
