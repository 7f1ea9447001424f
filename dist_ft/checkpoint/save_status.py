"""The state of a save: what was requested, how far it has got, how it ended.

Data only; the manager decides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dist_ft.checkpoint.ledger import LedgerRows
from dist_ft.checkpoint.manifest import FileEntry, Progress, TensorInfo, no_cursors
from dist_ft.checkpoint.tier import Tier
from dist_ft.core.errors import CheckpointError, DistFtError, StorageError
from dist_ft.storage.filesystem import Store

log = logging.getLogger("dist_ft.checkpoint")


class LostSharedError(StorageError):
    """A file shared by checkpoints differs from what was written.

    The next save writes these files again.
    """


@dataclass(frozen=True)
class SaveRequest:
    """A requested checkpoint, except for its files.

    Attributes:
        run: name of the run.
        engine: class name of the engine that trained it.
        progress: the progress at this checkpoint.
        rows: this worker's ledger rows since the last checkpoint.
        tensors: full shapes of the model's weights.
        aliases: names of tied weights, to the names they are saved under.
        evaluation: held-out metrics at this step.
        tier: where the files are written.
        commit_after: a background task that must end before the commit (rank 0 only).
        cursors: int64 (n, 6) where this worker's lanes are in streamed data; none if it is indexed.
    """

    run: str
    engine: str
    progress: Progress
    rows: LedgerRows
    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    evaluation: dict[str, float]
    tier: Tier = Tier.STORAGE
    commit_after: Future[None] | None = None
    cursors: np.ndarray = field(default_factory=no_cursors)


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended, the same on all ranks.

    Attributes:
        url: the checkpoint's folder.
        problem: why the checkpoint was not committed; None if it was.
    """

    request: SaveRequest
    url: str
    problem: StorageError | None


class SaveFlags(NamedTuple):
    """One rank's contribution to the sums over all ranks that advance a save; each field is 0 or 1.

    Attributes:
        files_written: all files of this rank are written, or failed.
        commit_ended: the commit on this rank has ended (rank 0 only).
    """

    files_written: float
    commit_ended: float


@dataclass
class SaveInProgress:
    """A save in progress.

    Files are written first, then all ranks exchange the results, then rank 0 commits.

    Attributes:
        name: name of the checkpoint's folder.
        files: entries of this worker's files.
        frozen: names of the weights that are not trained.
        shared: entries of the files of frozen weights, if this save writes them.
        agreed: whether all ranks have exchanged their results.
        commit: the commit in the background (rank 0 only).
    """

    request: SaveRequest
    name: str
    files: Future[list[FileEntry]]
    frozen: frozenset[str]
    shared: Future[list[FileEntry]] | None = None
    agreed: bool = False
    commit: Future[None] | None = None

    def is_written(self) -> bool:
        """Whether writing this worker's files has ended, successfully or not."""
        return self.files.done() and (self.shared is None or self.shared.done())

    def wait(self) -> None:
        """Wait until writing this worker's files has ended, successfully or not."""
        # `Future.result` would raise the error here; all ranks have to exchange it first.
        pending = [self.files]
        if self.shared is not None:
            pending.append(self.shared)
        wait(pending)

    def problem(self) -> DistFtError | None:
        """Return why this worker's files could not be written; None if they were."""
        problem = failure_of(self.files)
        if problem is None and self.shared is not None:
            problem = failure_of(self.shared)
        return problem


def failure_of(future: Future[Any]) -> DistFtError | None:
    """Return the error of a background task.

    Any other exception becomes a CheckpointError, which ranks can exchange.
    """
    error = future.exception()
    if error is None or isinstance(error, DistFtError):
        return error

    # A bug: the traceback stays in this rank's log, and the other ranks get its text.
    log.error("the save failed", exc_info=error)
    return CheckpointError(f"the save failed ({type(error).__name__}: {error})")


def run_synchronously(
    action: Callable[[Store], list[FileEntry]],
) -> Callable[[Store], Future[list[FileEntry]]]:
    """Return a function that runs `action` at once and returns its result as a future."""

    def run(folder: Store) -> Future[list[FileEntry]]:
        future: Future[list[FileEntry]] = Future()
        try:
            future.set_result(action(folder))
        except Exception as error:
            # Not raised: the other ranks have to learn of it as of a failure in the background.
            future.set_exception(error)
        return future

    return run
