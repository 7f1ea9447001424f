"""The proof of promise 1: what a run's ledger says was consumed, held against what its data holds.

Reads the ledger of the newest commit (all attempts of its history) and the run's index; no tokens. Each piece may come
once in an epoch of its source, and an epoch that all lanes have passed must hold every piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint.ledger import read_ledger
from dist_ft.config.load import STORED, load_config
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import DataError
from dist_ft.core.world import Collectives, World
from dist_ft.data.blocks import index_file
from dist_ft.data.blocks.index import Index
from dist_ft.data.sampling.batch_plan import Plan
from dist_ft.data.sources.discovery import resolve
from dist_ft.runtime.bootstrap.build_data import FOLDER
from dist_ft.storage import filesystem
from dist_ft.storage.filesystem import Store


@dataclass(frozen=True)
class EpochCount:
    """One epoch of one source: pieces there are, that came, that came again, and that should have come and did not."""

    source: str
    epoch: int
    num_pieces: int
    num_seen: int
    num_repeated: int
    num_lost: int

    @property
    def is_sound(self) -> bool:
        """Whether none came twice and none is missing."""
        return not self.num_repeated and not self.num_lost


@dataclass(frozen=True)
class Audit:
    """What the ledger proves, up to the newest commit."""

    step: int
    attempts: int
    num_rows: int
    epochs: tuple[EpochCount, ...]

    @property
    def is_sound(self) -> bool:
        """Whether every epoch is."""
        return all(count.is_sound for count in self.epochs)


def audit(url: str) -> Audit:
    """Return what the ledger of the run at `url` proves. Raises DataError, CheckpointError if it can prove nothing."""
    store = Store(url)
    config = _stored_config(store)
    filesystem.configure(config.storage.options)
    index = index_file.load(store, f"{FOLDER}/data.train")
    newest = discovery.newest(store, World(), Collectives())
    if index is None or newest is None:
        raise DataError(
            f"{store.shown()}: has no checkpoint yet, so nothing was committed; a run with one is needed; "
            "let it reach one"
        )
    rows = read_ledger(store, newest)
    plan = Plan(index.counts, index.sources, config.reading, config.batch, config.run.seed)
    return Audit(
        newest.progress.step,
        len(set(store.list(discovery.ATTEMPTS))),
        len(rows),
        tuple(_count(rows, index, plan, config, newest.progress.step)),
    )


def verify_shards(url: str) -> int:
    """Refuse data that changed since the run at `url` began; return how many shards were held against the index."""
    store = Store(url)
    config = _stored_config(store)
    filesystem.configure(config.storage.options)
    index = index_file.load(store, f"{FOLDER}/data.train")
    if index is None:
        raise DataError(
            f"{store.shown()}: has no index yet, so nothing was read; start the run first"
        )
    index.verify_unchanged([shard for found in resolve(config.data.train) for shard in found])
    return len(index.shards)


def _stored_config(store: Store) -> RunConfig:
    if not store.exists(STORED):
        raise DataError(
            f"{store.shown()}: is no run ({STORED} is not there); the URL of a run is "
            "<run.storage>/<run.name>; check it"
        )
    return load_config(store.full(STORED))


def _count(
    rows: np.ndarray, index: Index, plan: Plan, config: RunConfig, steps: int
) -> list[EpochCount]:
    """Return the counts of every epoch of every source that the rows (n, 6) touch."""
    first = index.first_samples
    block = np.searchsorted(first, rows[:, 3], side="right") - 1
    sources = index.sources[block]
    drawn = plan.drawn_by_all(steps)
    found = []
    for number, source in enumerate(config.data.train):
        total = sum(
            m.num_pieces
            for b, m in zip(index.blocks, index.measures, strict=True)
            if b.source == number
        )
        own = rows[sources == number]
        whole_epochs = drawn[number] // plan.num_sequences(number)
        for epoch in range(max(whole_epochs, int(own[:, 1].max(initial=-1)) + 1)):
            pieces = own[own[:, 1] == epoch][:, 3:5]
            distinct = len(np.unique(pieces, axis=0))
            lost = total - distinct if epoch < whole_epochs else 0
            found.append(
                EpochCount(
                    source.name or f"source-{number}",
                    epoch,
                    total,
                    len(pieces),
                    len(pieces) - distinct,
                    lost,
                )
            )
    return found


def describe(found: Audit) -> str:
    """Return the lines that tell a person about it."""
    lines = [
        f"steps 0 to {found.step} over {found.attempts} attempts: {found.num_rows:,} pieces in the ledger"
    ]
    for count in found.epochs:
        share = "all" if count.num_seen == count.num_pieces else f"{count.num_seen:,} of"
        lines.append(
            f"  {count.source}, epoch {count.epoch}: {share} {count.num_pieces:,} pieces once, "
            f"{count.num_lost:,} lost, {count.num_repeated:,} repeated"
        )
    lines.append("exactly once: " + ("yes" if found.is_sound else "NO"))
    return "\n".join(lines)
