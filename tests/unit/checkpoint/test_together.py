"""All ranks restore together: they share the headers, and fall back if one finds damage."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from unit.small import checkpoints, draft, make_engine, make_model, tensors_of, train

from dist_ft.checkpoint import fragments
from dist_ft.checkpoint.discovery import start_attempt
from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.core.errors import StorageError
from dist_ft.core.world import Collectives, World
from dist_ft.storage.filesystem import Store

SIZE = 2
TRAINING = threading.Lock()
"""Models of one process must train one at a time (`packed_attention`)."""


class Threads(Collectives):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, values: list[Any], meeting: threading.Barrier) -> None:
        self._rank, self._values, self._meeting = rank, values, meeting

    def all_gather(self, value: Any) -> list[Any]:
        self._values[self._rank] = value
        self._meeting.wait(20)
        found = list(self._values)
        self._meeting.wait(20)
        return found

    def gather(self, value: Any) -> list[Any] | None:
        return self.all_gather(value) if self._rank == 0 else self.all_gather(value) and None

    def broadcast(self, value: Any) -> Any:
        return self.all_gather(value)[0]

    def sum(self, values: Any) -> list[float]:
        return [float(sum(column)) for column in zip(*self.all_gather(list(values)), strict=True)]


class Rank:
    """One rank: a whole model of which it saves every other slice."""

    def __init__(self, rank: int, store: Store, collectives: Collectives, attempt: int) -> None:
        self.rank = rank
        self.engine = make_engine(model=make_model(initializer_range=1.0))
        self.manager = CheckpointManager(
            store, checkpoints(keep_last=9), World(rank, SIZE), collectives, attempt
        )
        self.frozen_parameters = self.engine.frozen_parameters
        self.optimizer_step, self.finish_load = self.engine.optimizer_step, self.engine.finish_load

    def state_slices(self):
        return (
            replace(part, owned=index % SIZE == self.rank)
            for index, part in enumerate(self.engine.state_slices())
        )

    def save(self, step: int) -> None:
        with TRAINING:
            train(self.engine, range(step - 1, step))
        rows = np.zeros((0, 6), dtype=np.int64)
        self.manager.save(self, draft(self.engine, step, rows))

    def load(self) -> int:
        manifest = self.manager.find_latest()
        assert manifest is not None and manifest.progress.step == 2
        return self.manager.load(manifest, self, tensors_of(self.engine)).progress.step


@pytest.fixture
def together(store, monkeypatch):
    """Return a function that runs an action on all ranks of a new attempt."""
    monkeypatch.setattr(fragments, "MAX_FILE_BYTES", 2**16)

    def run(action):
        meeting, values, attempt = (
            threading.Barrier(SIZE),
            [None] * SIZE,
            start_attempt(store, SIZE),
        )
        ranks = [Rank(rank, store, Threads(rank, values, meeting), attempt) for rank in range(SIZE)]
        with ThreadPoolExecutor(SIZE) as threads:
            return ranks, [
                future.result() for future in [threads.submit(action, rank) for rank in ranks]
            ]

    return run


def saved(together) -> list[np.ndarray]:
    """Save steps 1 and 2 and return the state at step 1."""
    states = []

    def save(rank: Rank) -> None:
        rank.save(1)
        if rank.rank == 0:
            states.extend(part.read().numpy().copy() for part in rank.state_slices())
        rank.save(2)

    together(save)
    return states


@pytest.mark.parametrize("owner", range(SIZE))
def test_fault_17_damage_found_by_one_rank_makes_all_ranks_fall_back(
    store, together, caplog, owner
):
    expected = saved(together)
    folder = store.full_url("checkpoints/step-000000002-a0001")
    name = sorted(name for name in os.listdir(folder) if name.startswith(f"rank-{owner:05d}"))[-1]
    with open(os.path.join(folder, name), "rb+") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    ranks, steps = together(Rank.load)
    assert steps == [1, 1]
    for rank in ranks:
        assert all(
            np.array_equal(part.read(), values)
            for part, values in zip(rank.state_slices(), expected, strict=True)
        )
    message = [
        record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()
    ]
    assert message == [
        f"checkpoint step-000000002-a0001 is skipped: {folder}/{name}: its checksum differs from "
        "the manifest's"
    ]


def test_each_header_is_read_by_one_rank(store, together, monkeypatch):
    saved(together)
    read_paths: list[str] = []

    def read_index(files, paths, real=fragments.read_index):
        read_paths.extend(paths)
        return real(files, paths)

    monkeypatch.setattr(fragments, "read_index", read_index)
    _, steps = together(Rank.load)
    files = [
        name
        for name in os.listdir(store.full_url("checkpoints/step-000000002-a0001"))
        if name.startswith("rank-")
    ]
    assert steps == [2, 2] and sorted(read_paths) == sorted(files) and len(files) > SIZE


def test_a_storage_error_on_one_rank_stops_all_ranks(store, together, monkeypatch):
    saved(together)

    def read_into(self, path, start, memory, real=Store.read_into):
        if path.startswith("rank-00001"):
            raise StorageError(f"{path}: no answer")
        return real(self, path, start, memory)

    monkeypatch.setattr(Store, "read_into", read_into)

    def load(rank: Rank) -> str:
        with pytest.raises(StorageError) as caught:
            rank.load()
        return str(caught.value)

    _, message = together(load)
    assert message[0] == message[1] and "no answer" in message[0]
