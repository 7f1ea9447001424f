"""The proof of promise 1: compares what a run's ledger says was consumed with what its data holds.

Reads the ledger of the latest checkpoint (all attempts of its history) and the run's index, but no
tokens. Each segment may come once in an epoch of its source, and an epoch that all lanes have
passed must hold every segment. The storage options in the run's config are not applied: the run may
be someone else's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint.attempts import ATTEMPTS, number_in_name
from dist_ft.checkpoint.ledger import read_history
from dist_ft.checkpoint.manifest import cursors_of
from dist_ft.config.load import STORED, load_stored_config
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import DataError
from dist_ft.core.world import Collectives, World
from dist_ft.data.blocks import index_file, stream_file
from dist_ft.data.blocks.index import Index
from dist_ft.data.sampling.batch_plan import BatchPlan
from dist_ft.data.sources.discovery import discover_shards
from dist_ft.runs.epoch_counts import (
    EpochCount,
    count_indexed_source,
    count_stream_epochs,
    verify_streamed_shards,
)
from dist_ft.runs.stored_run import require_readable
from dist_ft.runtime.bootstrap.build_data import INDEX
from dist_ft.runtime.bootstrap.build_stream import REST, STREAM
from dist_ft.storage.filesystem import Store


@dataclass(frozen=True)
class Audit:
    """What the ledger proves, up to the latest checkpoint.

    Attributes:
        step: step of the checkpoint.
        attempts: number of attempts of the run.
        num_rows: rows of the ledger, one for each consumed segment.
        epochs: counts of each epoch of each source.
    """

    step: int
    attempts: int
    num_rows: int
    epochs: tuple[EpochCount, ...]

    @property
    def is_sound(self) -> bool:
        """Whether every epoch is sound."""
        return all(count.is_sound for count in self.epochs)


def audit(url: str) -> Audit:
    """Return what the ledger of the run at `url` proves.

    Raises:
        DataError: the run has no checkpoint yet.
        CheckpointError: the ledger is damaged or has a hole.
    """
    store = Store(url)
    config = _stored_config(store)

    # Which rows the ledger has depends on the checkpoint: steps after it will be repeated.
    latest = discovery.find_latest(store, World(), Collectives())
    description = stream_file.load(store, STREAM)
    index = index_file.load(store, INDEX if description is None else REST)
    if latest is None or (index is None and description is None):
        raise DataError(
            f"{store.redacted_url()}: no checkpoint yet, so there is nothing to verify. "
            "Let the run reach its first checkpoint."
        )

    history = read_history(store, latest)
    if description is None:
        assert index is not None
        epochs = _count_index_epochs(history.samples, index, config, latest.progress.step)
    else:
        epochs = count_stream_epochs(history, description, index, config, cursors_of(latest))
    return Audit(latest.progress.step, _count_attempts(store), len(history.samples), tuple(epochs))


def verify_shards(url: str, named: Sequence[str] = ()) -> int:
    """Compare the shards of the run at `url` with its index; return the number of shards.

    Args:
        url: the run's folder.
        named: places of data that the user named; others than the run's own are not read.

    Raises:
        DataError: a shard changed since the run started, or lies in a place that nobody named.
    """
    store = Store(url)
    config = _stored_config(store)
    require_readable(
        store,
        config.data.train,
        "data.train",
        named,
        "Give the run's config (dist-ft data verify CONFIG), or name the place (--data).",
    )

    shards_by_source = discover_shards(config.data.train)
    description = stream_file.load(store, STREAM)
    if description is not None:
        return verify_streamed_shards(description, shards_by_source)

    index = index_file.load(store, INDEX)
    if index is None:
        raise DataError(
            f"{store.redacted_url()}: no index yet, so no data was read. Start the run first."
        )
    index.verify_unchanged([shard for shards in shards_by_source for shard in shards])
    return len(index.shards)


def _stored_config(store: Store) -> RunConfig:
    if not store.exists(STORED):
        raise DataError(
            f"{store.redacted_url()}: not a run (it has no {STORED}). Give the folder "
            "<run.storage>/<run.name>."
        )

    return load_stored_config(store)


def _count_attempts(store: Store) -> int:
    """Return the number of attempts of the run."""
    # Not the highest number: numbers may be left out. The folder also holds stacks of hung workers.
    num_attempts = 0
    for name in store.list(ATTEMPTS):
        if name.endswith(".json") and number_in_name(ATTEMPTS, name):
            num_attempts += 1
    return num_attempts


def _count_index_epochs(
    rows: np.ndarray, index: Index, config: RunConfig, num_steps: int
) -> list[EpochCount]:
    """Return the counts of every epoch of every source of an indexed run.

    Args:
        rows: (N, 6) int64, see `checkpoint.ledger.COLUMNS`.
        index: the run's index.
        config: the run's config.
        num_steps: steps the ledger covers.
    """
    # The plan only says how many epochs are complete. What was seen comes from the ledger, which
    # records the batches themselves: comparing the plan with itself would prove nothing.
    plan = BatchPlan(
        index.counts, index.sources, config.effective_data, config.batch, config.run.seed
    )

    # A lower bound: lanes draw from weighted sources at different rates, and only draws that all of
    # them have passed must be in the ledger.
    num_drawn = plan.min_draws_by_source(num_steps)

    counts = []
    for number in range(len(config.data.train)):
        num_whole_epochs = num_drawn[number] // plan.num_sequences(number)
        counts += count_indexed_source(rows, index, config, number, num_whole_epochs)
    return counts


def describe(audit: Audit) -> str:
    """Return an audit as text."""
    plural = "" if audit.attempts == 1 else "s"
    lines = [
        f"steps 0 to {audit.step} over {audit.attempts} attempt{plural}: "
        f"{audit.num_rows:,} segments in the ledger"
    ]

    for count in audit.epochs:
        share = "all" if count.num_seen == count.num_segments else f"{count.num_seen:,} of"
        lines.append(
            f"  {count.source}, epoch {count.epoch}: {share} {count.num_segments:,} segments once, "
            f"{count.num_lost:,} lost, {count.num_repeated:,} repeated"
        )

    lines.append(f"exactly once: {'yes' if audit.is_sound else 'NO'}")
    return "\n".join(lines)
