"""A save: what it says, how far it is, how it ended. Values only; the manager decides."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_ft.checkpoint.manifest import FileEntry, Progress, TensorInfo
from dist_ft.core.errors import CheckpointError, DistFtError, StorageError
from dist_ft.storage.filesystem import Store

log = logging.getLogger("dist_ft.checkpoint")


class LostSharedError(StorageError):
    """A file that checkpoints share is not what was written: the next save writes them anew."""


@dataclass(frozen=True)
class SaveRequest:
    """What a checkpoint says besides its files.

    Attributes:
        on_nodes: its files go to the workers' nodes, not to storage.
        before: what must be over before the commit (rank 0's).
        rows: this worker's rows of the ledger since the last checkpoint.
        engine: name of the engine that made it.
    """

    run: str
    engine: str
    progress: Progress
    rows: np.ndarray
    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    evaluation: dict[str, float]
    on_nodes: bool = False
    before: Future[None] | None = None


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended, the same on all ranks: committed at `url`, or `problem` says why not."""

    draft: SaveRequest
    url: str
    problem: StorageError | None


@dataclass
class SaveInProgress:
    """A save under way: files first; `agreed` once all ranks know of all files; then rank 0's commit.

    Attributes:
        frozen: names of the weights that do not learn.
        shared: their files, where none of this run hold them yet.
    """

    draft: SaveRequest
    name: str
    files: Future[list[FileEntry]]
    frozen: frozenset[str]
    shared: Future[list[FileEntry]] | None = None
    agreed: bool = False
    commit: Future[None] | None = None

    def is_written(self) -> bool:
        """Tell whether all files of this worker are written, or failed to be."""
        return self.files.done() and (self.shared is None or self.shared.done())

    def wait(self) -> None:
        """Wait until all files of this worker are written, or failed to be."""
        wait([self.files, *([self.shared] if self.shared is not None else [])])

    def problem(self) -> DistFtError | None:
        """Return what the writing of this worker's files failed with."""
        return failure_of(self.files) or (
            failure_of(self.shared) if self.shared is not None else None
        )


def failure_of(future: Future[Any]) -> DistFtError | None:
    """Return what a background action of ours failed with; a bug is an error all ranks can be told of."""
    error = future.exception()
    if error is None or isinstance(error, DistFtError):
        return error
    log.error("the save failed", exc_info=error)
    return CheckpointError(f"the save failed ({type(error).__name__}: {error})")


def run_synchronously(action: Callable[[Store], list[FileEntry]]) -> Callable[[Store], Future[list[FileEntry]]]:
    """Return `action`, done here and now, its result or error in a future."""

    def run(folder: Store) -> Future[list[FileEntry]]:
        future: Future[list[FileEntry]] = Future()
        try:
            future.set_result(action(folder))
        except Exception as error:
            future.set_exception(error)
        return future

    return run
