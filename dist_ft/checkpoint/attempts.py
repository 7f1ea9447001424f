"""Numbers the attempts at a run, and says whether an attempt may still write into it.

The number of an attempt is one more than the highest that anything in the run carries, so that no
lost file or folder can lower it. The record of the attempt is created exclusively and holds a token
of its own: should two starts take one number, only the one whose token is stored may commit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from datetime import datetime, timezone
from typing import Any, TypedDict, cast
from uuid import uuid4

from dist_ft.checkpoint.tier import Tier
from dist_ft.config.load import STORED
from dist_ft.core.errors import PLANNED, CheckpointError, ConfigError, StorageError
from dist_ft.core.json_documents import decode_json
from dist_ft.core.logs import redact
from dist_ft.storage.documents import MAX_BYTES
from dist_ft.storage.filesystem import Store
from dist_ft.storage.stored_json import read_stored_json

log = logging.getLogger("dist_ft.checkpoint")
ATTEMPTS = "attempts"
"""Folder of a run with the record of each attempt, and the stacks of workers that hung."""
FROZEN = "frozen"
"""Folder of a run with the files of frozen weights, which checkpoints share."""
LEDGER = "ledger"
"""Folder of a run with the segments of the ledger."""
TIME = "time"
"""Folder of a run with the time record of each attempt."""
TENSORBOARD = "tensorboard"
"""Folder of a run with a folder of events for each attempt."""
MAX_TAKEN = 1000
"""Numbers in a row that other starts may take before a start gives up."""
NOT_EXCLUSIVE = (
    "a file that exists could be created again, so two starts of a run could not be distinguished. "
    "Only storage with conditional writes (If-None-Match) is allowed. Use another endpoint or file "
    "system."
)


class AttemptDocument(TypedDict, total=False):
    """The record of an attempt as it is stored.

    Attributes:
        attempt: its number.
        world_size: its number of ranks.
        started_at: ISO 8601 in UTC.
        failures: failures of earlier attempts that were noticed.
        token: distinguishes two starts that took the same number.
        after: why the attempt before it ended.
    """

    attempt: int
    world_size: int
    started_at: str
    failures: int
    token: str
    after: str


_CHECKPOINT = re.compile(r"step-[0-9]+-a([0-9]+)")
_NUMBER_IN_NAME = {
    ATTEMPTS: re.compile(r"([0-9]+)(?:\.json|-rank-[0-9]+-stacks\.txt)?"),
    TIME: re.compile(r"([0-9]+)\.json"),
    Tier.STORAGE.value: _CHECKPOINT,
    Tier.LOCAL.value: _CHECKPOINT,
    FROZEN: _CHECKPOINT,
    LEDGER: re.compile(r"[0-9]+-[0-9]+-a([0-9]+)\.safetensors\.zst"),
    TENSORBOARD: re.compile(r"attempt-([0-9]+)"),
}
"""The folders of a run whose names carry the number of an attempt, and where it stands in them."""


def number_in_name(folder: str, name: str) -> int:
    """Return the number of the attempt that wrote `name` in a folder of a run; 0 if none."""
    match = _NUMBER_IN_NAME[folder].fullmatch(name)
    return int(match[1]) if match else 0


def latest_attempt(store: Store) -> int:
    """Return the highest attempt number that anything in the run carries; 0 before the first."""
    latest = 0
    for folder in _NUMBER_IN_NAME:
        for name in store.list(folder):
            latest = max(latest, number_in_name(folder, name))
    return latest


def latest_record(store: Store) -> int:
    """Return the highest number of a recorded attempt, by one listing; 0 if none is recorded.

    Enough for what a worker of an older attempt may overwrite without harm. Commits use `Fence`.
    """
    return max((number_in_name(ATTEMPTS, name) for name in store.list(ATTEMPTS)), default=0)


def committed_step(store: Store, attempt: int = 0) -> int:
    """Return the last step that was certainly committed by `attempt` or a later one.

    0 if there is none.
    """
    # A segment of the ledger starts where the checkpoint before it ends.
    step = 0
    for name in store.list(LEDGER):
        if number_in_name(LEDGER, name) >= max(attempt, 1):
            step = max(step, int(name.partition("-")[0]))

    # The last checkpoint has no segment after it, but the attempt noted it.
    for name in store.list(TIME):
        if number_in_name(TIME, name) >= max(attempt, 1):
            step = max(step, _noted_commit(store, f"{TIME}/{name}"))
    return step


def _noted_commit(store: Store, path: str) -> int:
    """Return the step that an attempt noted as committed; 0 if it noted none."""
    try:
        step = read_stored_json(store, path, dict, "").get("committed")
    except (CheckpointError, StorageError):
        return 0  # it only reports losses, and may be lost itself
    return step if isinstance(step, int) else 0


def record_path(attempt: int) -> str:
    """Return the file of a run with the record of an attempt."""
    return f"{ATTEMPTS}/{attempt:06d}.json"


def start_attempt(store: Store, num_ranks: int, previous_end: str = "", known: int = 0) -> int:
    """Reserve the next attempt number of the run for all ranks (call on rank 0 only).

    Args:
        store: the run's folder.
        num_ranks: ranks of the new attempt.
        previous_end: why the previous attempt ended, if known. An unplanned end counts as a
            failure.
        known: an attempt number that the nodes know of; the new one is higher.

    Raises:
        ConfigError: the storage lets two starts take one number.
        CheckpointError: another start took the number at the same moment.
    """
    latest = max(known, latest_attempt(store))
    is_failure = bool(previous_end) and not previous_end.startswith(PLANNED)
    record: AttemptDocument = {
        "attempt": 0,
        "world_size": num_ranks,
        "started_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "failures": num_failures(store, latest) + is_failure,
        "token": uuid4().hex,
    }
    if previous_end:
        record["after"] = redact(previous_end)

    # Another process may take a number between the listing and this call. Numbers may be left out,
    # but never be used twice.
    for number in range(latest + 1, latest + 1 + MAX_TAKEN):
        content = json.dumps({**record, "attempt": number}).encode()
        if store.create(record_path(number), content):
            _require_exclusive(store, record_path(number), content)
            return number

    raise CheckpointError(
        f"{store.redacted_url(ATTEMPTS)}: {MAX_TAKEN} attempt numbers in a row are taken. Stop the "
        "other starts of this run, and start it once."
    )


def _require_exclusive(store: Store, path: str, content: bytes) -> None:
    """Raise unless the record that was just created can be created only once, and is ours.

    Here and not in `check` alone, which can be left out and which other processes do not see.
    """
    if store.create(path, content):
        # Nothing ran under this number, and an attempt that is running keeps its own.
        with contextlib.suppress(StorageError):
            store.remove(path)
        raise ConfigError([f"run.storage: {NOT_EXCLUSIVE}"], f"start of {store.redacted_url()}")

    # A store may check and write in two steps: then the last of two writers has the number.
    if store.read(path) != content:
        raise CheckpointError(
            f"{store.redacted_url(path)}: another start of this run took the number at the same "
            "moment. Only one start may run. This one ends."
        )


def num_failures(store: Store, attempt: int) -> int:
    """Return how many attempts before `attempt` ended in a failure that was noticed."""
    if not attempt:
        return 0

    # The count only tunes the save interval, so a lost record is no error.
    try:
        return int(read_record(store, attempt).get("failures", 0))
    except (StorageError, ValueError, TypeError, OverflowError):
        return 0


def read_record(store: Store, attempt: int) -> AttemptDocument:
    """Return the record of an attempt.

    Raises:
        StorageError: it is missing, is a folder, or the storage does not respond.
        ValueError: it is torn, empty or no JSON object.
    """
    return _parse_record(store.read_at_most(record_path(attempt), MAX_BYTES))


def _parse_record(content: bytes) -> AttemptDocument:
    record = decode_json(content)
    if not isinstance(record, dict):
        raise ValueError(f"it holds {type(record).__name__}, not an object")
    return cast(AttemptDocument, record)


class Fence:
    """Says whether an attempt is still the one that may write into its run (rank 0 only)."""

    def __init__(self, store: Store, attempt: int) -> None:
        """Store the arguments; nothing is read or written."""
        self._store = store
        self._attempt = attempt
        self._path = record_path(attempt)
        self._record: bytes | None = None
        # The record of the attempt before, by which the run is known.
        self._before: bytes | None = None

    def remember_record(self) -> None:
        """Read the record of this attempt, with which `require_current` compares.

        Called right after the attempt was started, when the record is certainly its own.
        """
        if self._record is not None:
            return

        self._before = self._read(self._attempt - 1)
        content = self._read()
        if content is None:
            # Removed since the start, a moment ago.
            content = json.dumps({"attempt": self._attempt, "token": uuid4().hex}).encode()
            if not self._store.create(self._path, content):
                content = self._read() or b""
        self._record = content

    def require_current(self, where: str) -> None:
        """Raise CheckpointError if this attempt must not commit; `where` names what it would write.

        A record that was lost while the attempt runs is written again.
        """
        self._require_not_older(latest_attempt(self._store), where)
        self.remember_record()
        assert self._record is not None
        content = self._read()
        if content == self._record:
            return

        if content is None:
            self.require_folder()
            self._require_same_run(where)
            log.warning("%s was removed; written again", self._store.redacted_url(self._path))

            # Exclusively: a start that found no trace of this attempt may take the same number.
            if self._store.create(self._path, self._record):
                return
            content = self._read() or b""

        self._require_own(content, where)

    def require_latest_record(self, where: str) -> None:
        """As `require_current`, by one listing: for a check that follows a whole one closely."""
        self._require_not_older(latest_record(self._store), where)

    def _require_not_older(self, latest: int, where: str) -> None:
        if latest > self._attempt:
            raise CheckpointError(
                f"{where}: attempt {self._attempt} must not commit, attempt {latest} has taken "
                "over the run; this process ends"
            )

    def require_folder(self) -> None:
        """Raise CheckpointError if the run's folder was removed while this attempt runs.

        A running attempt writes checkpoints and metrics, so that its folder exists again soon; but
        nothing else writes its record and its config.
        """
        if self._read() is None and not self._store.exists(STORED):
            raise CheckpointError(
                f"{self._store.redacted_url()}: the run's folder was removed while the run trains; "
                "what it held is lost. Restore it from a copy, or remove what is left of it and "
                "run the same command to start again."
            )

    def _require_same_run(self, where: str) -> None:
        """Raise CheckpointError if the run was removed and started again, from number 1 on."""
        has_records = bool(latest_record(self._store))
        if has_records and self._read(self._attempt - 1) != self._before:
            raise CheckpointError(
                f"{where}: attempt {self._attempt} must not commit, the run was removed and "
                "started again; this process ends"
            )

    def _require_own(self, content: bytes, where: str) -> None:
        """Raise CheckpointError if a record in the place of ours belongs to another start."""
        try:
            token = _parse_record(content).get("token")
        except ValueError:
            token = None

        if token is not None and token != self._own_token():
            raise CheckpointError(
                f"{where}: attempt {self._attempt} must not commit, another start of the run took "
                "the same number; this process ends"
            )

        # Torn, emptied or altered, but nobody else's. Its number is in its name, which counts.
        log.warning("%s was damaged; written again", self._store.redacted_url(self._path))
        with contextlib.suppress(StorageError):  # a folder in its place
            self._store.write(self._path, self._record or b"")

    def _own_token(self) -> Any:
        """Return the token of this attempt; None if it was started by version 0.1.0."""
        assert self._record is not None
        try:
            return _parse_record(self._record).get("token")
        except ValueError:
            return None

    def _read(self, attempt: int | None = None) -> bytes | None:
        """Return the record of an attempt as it is stored; None if it is missing.

        Default: of this attempt.
        """
        path = self._path if attempt is None else record_path(attempt)
        try:
            return self._store.read(path)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            if isinstance(error.__cause__, IsADirectoryError):
                return b""
            raise
