"""What a run has stored: its attempts and checkpoints, which are intact and which can be removed.

Reads manifests and listings; `verify` reads every byte. Only `prune` removes anything, and never
the latest intact checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.attempts import ATTEMPTS, number_in_name
from dist_ft.checkpoint.manifest import Manifest
from dist_ft.checkpoint.retention import (
    rank_by_evaluation,
    remove_unused_shared_files,
    select_retained,
)
from dist_ft.config.load import STORED
from dist_ft.config.schema import CheckpointSection
from dist_ft.core.errors import CheckpointError, DataError, DocumentError, StorageError
from dist_ft.core.world import World
from dist_ft.runs import time_accounting
from dist_ft.storage.documents import read_json_object
from dist_ft.storage.filesystem import Store
from dist_ft.training.console import format_table


@dataclass(frozen=True)
class CheckpointSummary:
    """One committed checkpoint, by its manifest.

    Attributes:
        name: name of its folder.
        num_bytes: size of its own files.
        num_files: number of its own files.
        world_size: number of workers that wrote it.
        created_at: when it was written (UTC, ISO 8601).
        problem: why its manifest cannot be read; "" if it can.
        num_shared_bytes: size of files it shares with other checkpoints.
        loss: held-out loss at this step, if it was evaluated.
    """

    name: str
    num_bytes: int = 0
    num_files: int = 0
    world_size: int = 0
    created_at: str = ""
    problem: str = ""
    num_shared_bytes: int = 0
    loss: float | None = None


class VerifiedCheckpoint(NamedTuple):
    """A checkpoint whose every byte was read, and what is wrong with it; "" if it is intact."""

    name: str
    problem: str


def run_names(url: str) -> list[str]:
    """Return the names of the runs in a storage folder (run.storage)."""
    store = Store(url)
    return [name for name in store.list() if is_run(store.child(name))]


def is_run(store: Store) -> bool:
    """Return whether a run was started at `store`."""
    return store.exists(STORED)


def open_run(url: str) -> Store:
    """Return the folder of a run.

    Raises:
        DataError: the folder holds no run.
    """
    store = Store(url)
    if not is_run(store):
        raise DataError(
            f"{store.redacted_url()}: not a run (it has no {STORED}). Give the folder "
            "<run.storage>/<run.name>. dist-ft runs list STORAGE lists them."
        )
    return store


def checkpoints(store: Store) -> list[CheckpointSummary]:
    """Return the committed checkpoints of the run at `store`, latest first."""
    return [_summarize(store, name) for name in discovery.list_committed(store)]


def _summarize(store: Store, name: str) -> CheckpointSummary:
    try:
        manifest = discovery.load_manifest(store, name)
    except CheckpointError as error:
        return CheckpointSummary(name, problem=str(error))

    # Frozen weights are stored once for the run: counted with every checkpoint that refers to them,
    # they would make each look as large as the model.
    num_files = num_bytes = num_shared_bytes = 0
    for item in manifest.files:
        if item.shared:
            num_shared_bytes += item.num_bytes
        else:
            num_files += 1
            num_bytes += item.num_bytes

    return CheckpointSummary(
        name,
        num_bytes,
        num_files,
        manifest.world_size,
        manifest.created_at,
        num_shared_bytes=num_shared_bytes,
        loss=manifest.evaluation.get("loss"),
    )


def attempts(store: Store) -> list[str]:
    """Return a line for every attempt of the run at `store`, oldest first.

    A line names the reason for the attempt, and the stack files of workers that hung in it.
    """
    lines = []
    names = store.list(discovery.ATTEMPTS)
    for name in names:
        # The watchdog writes the stacks of hung workers into the same folder.
        number = number_in_name(ATTEMPTS, name)
        if not number or not name.endswith(".json"):
            continue

        line = f"{number}: {_describe_attempt(store, name)}"
        stacks = [other for other in names if other.startswith(f"{number:06d}-rank-")]
        if stacks:
            line += f"; made no progress: {', '.join(stacks)}"
        lines.append(line)

    return lines


def _describe_attempt(store: Store, name: str) -> str:
    # One damaged record must not hide the other attempts.
    try:
        note = read_json_object(store, f"{discovery.ATTEMPTS}/{name}")
    except (DocumentError, StorageError) as error:
        return f"its record {discovery.ATTEMPTS}/{name} cannot be read ({error})"

    line = f"{note.get('started_at', '?')}, world {note.get('world_size', '?')}"
    if note.get("after"):
        line += f"; after {note['after']}"
    return line


def describe_all(url: str) -> str:
    """Return a table with a line for every run in a storage folder."""
    store = Store(url)
    rows = []
    for name in run_names(url):
        run = store.child(name)

        # Names of folders suffice here. Reading every manifest of every run would take minutes on
        # an object store.
        committed = discovery.list_committed(run)
        step = _step_of(committed[0]) if committed else 0
        num_attempts = discovery.latest_attempt(run)

        num_checkpoints = _count(len(committed), "checkpoint")
        rows.append((name, f"step {step:,}, {num_checkpoints}, {_count(num_attempts, 'attempt')}"))

    if not rows:
        raise DataError(
            f"{store.redacted_url()}: holds no runs. Give the folder that run.storage names."
        )
    return format_table(f"runs in {store.redacted_url()}", rows)


def describe(url: str) -> str:
    """Return a table of a run's attempts, checkpoints and time."""
    store = open_run(url)
    attempt_lines = attempts(store)
    checkpoint_lines = [_checkpoint_line(item) for item in checkpoints(store)]
    rows = [
        *_titled("attempt", attempt_lines),
        *_titled("checkpoint", checkpoint_lines),
        *_titled("time", list(time_accounting.lines(store))),
    ]
    return format_table(f"run {store.redacted_url()}", rows)


def _checkpoint_line(checkpoint: CheckpointSummary) -> str:
    if checkpoint.problem:
        return f"{checkpoint.name}: {checkpoint.problem}"

    size = f"{checkpoint.num_bytes / 2**20:,.1f} MiB in {_count(checkpoint.num_files, 'file')}"
    if checkpoint.num_shared_bytes:
        size += f" and {checkpoint.num_shared_bytes / 2**20:,.1f} MiB shared"

    line = f"{checkpoint.name}: {size}, world {checkpoint.world_size}, {checkpoint.created_at}"
    if checkpoint.loss is not None:
        line += f", held-out loss {checkpoint.loss:.4f}"
    return line


def verify(url: str) -> Iterator[VerifiedCheckpoint]:
    """Read every byte of each checkpoint, latest first, and yield what is wrong with it."""
    store = open_run(url)
    for name in discovery.list_committed(store):
        yield VerifiedCheckpoint(name, _find_damage(store, name))


def _find_damage(store: Store, name: str) -> str:
    try:
        discovery.verify_checksums(store, discovery.load_manifest(store, name), World())
    except CheckpointError as error:
        return str(error)
    return ""


def prune(url: str, section: CheckpointSection, remove: bool) -> list[str]:
    """Return the checkpoints that retention by `section` drops, after removing them if `remove`.

    The latest intact checkpoint always stays.
    """
    store = open_run(url)
    names = discovery.list_committed(store)
    ranks = rank_by_evaluation(store, names, section)
    retained = set(select_retained(names, section, ranks))

    # Retention counts damaged checkpoints too. If all retained ones were damaged, removing the rest
    # would leave a run that cannot resume.
    for name in names:
        if not _find_damage(store, name):
            retained.add(name)
            break

    dropped = [name for name in names if name not in retained]
    if remove:
        for name in dropped:
            # The manifest goes first: without it the checkpoint does not exist.
            store.remove(f"{discovery.FOLDER}/{name}/{manifests.NAME}")
            store.remove(f"{discovery.FOLDER}/{name}")

        # Last: until their manifests are gone, checkpoints still refer to shared files.
        remove_unused_shared_files(store, discovery.latest_attempt(store))

    return dropped


def diff(url: str, step: int, other_step: int) -> str:
    """Return a table of |change| / |weights| of each tensor between two steps, largest first."""
    import numpy as np

    store = open_run(url)
    first, second = _manifest_of(store, step), _manifest_of(store, other_step)
    first_reader = discovery.open_reader(store, first)
    second_reader = discovery.open_reader(store, second)

    changes = []
    for name, info in first.tensors.items():
        numel = math.prod(info.shape)
        key = "param" if (name, "param") in first_reader.keys() else "frozen"  # noqa: SIM118

        # (numel,) in float64: a float32 sum of millions of squares loses the small ones.
        before = first_reader.read(name, key, 0, numel).astype(np.float64)
        after = second_reader.read(name, key, 0, numel).astype(np.float64)

        # A tensor of zeros (a new bias, LoRA's B) has no relative change.
        norm = float(np.linalg.norm(before))
        change = float(np.linalg.norm(after - before)) / norm if norm else 0.0
        changes.append((change, name))

    changes.sort(reverse=True)
    rows = [(name, f"{change:.3e}") for change, name in changes]
    return format_table(
        f"step {step} to {other_step} of {store.redacted_url()}: |change| / |weights|", rows
    )


def _manifest_of(store: Store, step: int) -> Manifest:
    # A step that was repeated after a failure has a checkpoint of each attempt. Names are sorted
    # latest first; reversed, the latest attempt is written last and wins.
    names_by_step = {}
    for name in reversed(discovery.list_committed(store)):
        names_by_step[_step_of(name)] = name

    if step not in names_by_step:
        existing = ", ".join(str(number) for number in sorted(names_by_step)) or "none"
        raise CheckpointError(
            f"step {step}: {store.redacted_url()} has no checkpoint of it. "
            f"Existing steps: {existing}."
        )

    return discovery.load_manifest(store, names_by_step[step])


def _step_of(name: str) -> int:
    """Return the step in the name of a checkpoint's folder; 0 for another name."""
    parsed = manifests.parse_folder(name)
    return parsed[0] if parsed else 0


def _titled(title: str, lines: Sequence[str]) -> list[tuple[str, str]]:
    """Return rows of a table: the title stands next to the first line only."""
    rows = []
    for line in lines:
        rows.append((title, line))
        title = ""
    return rows


def _count(number: int, noun: str) -> str:
    plural = "" if number == 1 else "s"
    return f"{number} {noun}{plural}"
