"""What a run has stored: its attempts and checkpoints, whether they are intact, which can go.

Reads manifests and listings; `verify` reads every byte. Only `prune` removes anything, and never
the latest intact checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.manifest import Manifest
from dist_ft.checkpoint.retention import (
    rank_by_evaluation,
    remove_unused_shared_files,
    select_retained,
)
from dist_ft.config.load import STORED
from dist_ft.config.schema import CheckpointSection
from dist_ft.core.errors import CheckpointError, DataError
from dist_ft.core.world import World
from dist_ft.runs import time_accounting
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

    own_files = [item for item in manifest.files if not item.shared]
    return CheckpointSummary(
        name,
        sum(item.num_bytes for item in own_files),
        len(own_files),
        manifest.world_size,
        manifest.created_at,
        num_shared_bytes=sum(item.num_bytes for item in manifest.files if item.shared),
        loss=manifest.evaluation.get("loss"),
    )


def attempts(store: Store) -> list[str]:
    """Return a line for every attempt of the run at `store`, oldest first.

    A line names the reason for the attempt, and the stack files of workers that hung in it.
    """
    lines = []
    names = store.list(discovery.ATTEMPTS)
    for name in names:
        number = name.removesuffix(".json")
        if not (name.endswith(".json") and number.isdigit()):
            continue

        note = json.loads(store.read(f"{discovery.ATTEMPTS}/{name}"))
        line = f"{int(number)}: {note.get('started_at', '?')}, world {note.get('world_size', '?')}"
        if note.get("after"):
            line += f"; after {note['after']}"
        stacks = [other for other in names if other.startswith(f"{number}-rank-")]
        if stacks:
            line += f"; made no progress: {', '.join(stacks)}"
        lines.append(line)
    return lines


def describe_all(url: str) -> str:
    """Return a table with a line for every run in a storage folder."""
    store = Store(url)
    rows = []
    for name in run_names(url):
        run = store.child(name)
        committed = discovery.list_committed(run)
        step = _step_of(committed[0]) if committed else 0
        num_attempts = discovery.latest_attempt(run)
        rows.append(
            (
                name,
                f"step {step:,}, {_count(len(committed), 'checkpoint')}, "
                f"{_count(num_attempts, 'attempt')}",
            )
        )
    if not rows:
        raise DataError(
            f"{store.redacted_url()}: holds no runs. Give the folder that run.storage names."
        )
    return format_table(f"runs in {store.redacted_url()}", rows)


def describe(url: str) -> str:
    """Return a table of a run's attempts, checkpoints and time."""
    store = open_run(url)
    rows = [
        *_titled("attempt", attempts(store)),
        *_titled("checkpoint", [_checkpoint_line(item) for item in checkpoints(store)]),
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
    retained = set(select_retained(names, section, rank_by_evaluation(store, names, section)))
    latest_intact = next((name for name in names if not _find_damage(store, name)), "")
    retained.add(latest_intact)

    dropped = [name for name in names if name not in retained]
    if remove:
        for name in dropped:
            # The manifest goes first: without it the checkpoint does not exist.
            store.remove(f"{discovery.FOLDER}/{name}/{manifests.NAME}")
            store.remove(f"{discovery.FOLDER}/{name}")
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
        numel = int(np.prod(info.shape))
        key = "param" if (name, "param") in first_reader.keys() else "frozen"  # noqa: SIM118
        before = first_reader.read(name, key, 0, numel).astype(np.float64)
        after = second_reader.read(name, key, 0, numel).astype(np.float64)
        norm = float(np.linalg.norm(before))
        change = float(np.linalg.norm(after - before)) / norm if norm else 0.0
        changes.append((change, name))

    changes.sort(reverse=True)
    return format_table(
        f"step {step} to {other_step} of {store.redacted_url()}: |change| / |weights|",
        [(name, f"{change:.3e}") for change, name in changes],
    )


def _manifest_of(store: Store, step: int) -> Manifest:
    # Names are sorted latest first, so the latest attempt of a step wins.
    names_by_step = {_step_of(name): name for name in reversed(discovery.list_committed(store))}
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
    return [(title if number == 0 else "", line) for number, line in enumerate(lines)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
