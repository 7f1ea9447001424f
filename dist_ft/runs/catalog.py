"""What lies in a run's storage, for people: its attempts and checkpoints, whether they are sound, which can go.

Reads manifests and listings; `verify` reads every byte. Only `prune` removes, and never the newest sound checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.manifest import Manifest
from dist_ft.checkpoint.retention import forget_shared, held_out, kept
from dist_ft.config.load import STORED
from dist_ft.config.schema import CheckpointSection
from dist_ft.core.errors import CheckpointError, DataError
from dist_ft.core.world import World
from dist_ft.runs import time_accounting
from dist_ft.storage.filesystem import Store
from dist_ft.training.console import table

T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """One committed checkpoint; `problem` says why its manifest can not be read ("" if it can)."""

    name: str
    num_bytes: int = 0
    num_files: int = 0
    world_size: int = 0
    created_at: str = ""
    problem: str = ""
    num_shared_bytes: int = 0
    loss: float | None = None


def runs_below(url: str) -> list[str]:
    """Return the names of the runs in a storage folder (run.storage)."""
    store = Store(url)
    return [name for name in store.list() if store.exists(f"{name}/{STORED}")]


def checkpoints(store: Store) -> list[Kept]:
    """Return the committed checkpoints of the run at `store`, newest first."""
    return [_kept(store, name) for name in discovery.committed(store)]


def _kept(store: Store, name: str) -> Kept:
    try:
        manifest = discovery.load_manifest(store, name)
    except CheckpointError as error:
        return Kept(name, problem=str(error))
    own = [item for item in manifest.files if not item.shared]
    return Kept(
        name,
        sum(item.num_bytes for item in own),
        len(own),
        manifest.world_size,
        manifest.created_at,
        num_shared_bytes=sum(item.num_bytes for item in manifest.files if item.shared),
        loss=manifest.evaluation.get("loss"),
    )


def attempts(store: Store) -> list[str]:
    """Return a line for every start of the run at `store`, oldest first, and what it left behind when it hung."""
    lines = []
    names = store.list(discovery.ATTEMPTS)
    for name in names:
        number = name.removesuffix(".json")
        if name.endswith(".json") and number.isdigit():
            note = json.loads(store.read(f"{discovery.ATTEMPTS}/{name}"))
            stacks = [other for other in names if other.startswith(f"{number}-rank-")]
            hung = f"; made no progress: {', '.join(stacks)}" if stacks else ""
            after = f"; after {note['after']}" if note.get("after") else ""
            world = note.get("world_size", "?")
            lines.append(
                f"{int(number)}: {note.get('started_at', '?')}, world {world}{after}{hung}"
            )
    return lines


def describe_all(url: str) -> str:
    """Return a line for every run in a storage folder."""
    store, rows = Store(url), []
    for name in runs_below(url):
        names = discovery.committed(store.child(name))
        step = (manifests.parse_folder(names[0]) or (0, 0))[0] if names else 0
        rows.append(
            (
                name,
                f"step {step:,}, {_count(len(names), 'checkpoint')}, "
                f"{_count(discovery.newest_attempt(store.child(name)), 'attempt')}",
            )
        )
    if not rows:
        raise DataError(
            f"{store.shown()}: holds no runs; the folder that run.storage names is needed; check the URL"
        )
    return table(f"runs in {store.shown()}", rows)


def describe(url: str) -> str:
    """Return what lies in a run's folder."""
    store = _run(url)
    rows = [("attempt" if first else "", line) for first, line in _first(attempts(store))]
    for first, one in _first(checkpoints(store)):
        said = one.problem or (
            f"{one.num_bytes / 2**20:,.1f} MiB in {_count(one.num_files, 'file')}{_shared(one)}, "
            f"world {one.world_size}, {one.created_at}"
            + (f", held-out loss {one.loss:.4f}" if one.loss is not None else "")
        )
        rows.append(("checkpoint" if first else "", f"{one.name}: {said}"))
    rows += [
        ("time" if first else "", line)
        for first, line in _first(list(time_accounting.lines(store)))
    ]
    return table(f"run {store.shown()}", rows)


def _shared(one: Kept) -> str:
    return f" and {one.num_shared_bytes / 2**20:,.1f} MiB shared" if one.num_shared_bytes else ""


def verify(url: str) -> Iterator[tuple[str, str]]:
    """Yield (checkpoint, what is wrong with it; "" if nothing), newest first, having read every byte of each."""
    store = _run(url)
    for name in discovery.committed(store):
        yield name, _damage(store, name)


def _damage(store: Store, name: str) -> str:
    try:
        discovery.verify(store, discovery.load_manifest(store, name), World())
    except CheckpointError as error:
        return str(error)
    return ""


def prune(url: str, section: CheckpointSection, remove: bool) -> list[str]:
    """Return the checkpoints that retention by `section` does not keep, removed if `remove`; a sound one stays."""
    store = _run(url)
    names = discovery.committed(store)
    keep = set(kept(names, section, held_out(store, names, section)))
    keep |= {next((name for name in names if not _damage(store, name)), "")}
    gone = [name for name in names if name not in keep]
    for name in gone if remove else ():
        store.remove(f"{discovery.FOLDER}/{name}/{manifests.NAME}")
        store.remove(f"{discovery.FOLDER}/{name}")
    if remove:
        forget_shared(store, discovery.newest_attempt(store))
    return gone


def diff(url: str, one: int, other: int) -> str:
    """Return how two committed steps of a run differ: norm of the change over norm of the weights, largest first."""
    import numpy as np

    store = _run(url)
    first, second = (_manifest(store, step) for step in (one, other))
    readers = [discovery.reader(store, manifest) for manifest in (first, second)]
    changes = []
    for name, info in first.tensors.items():
        numel = int(np.prod(info.shape))
        key = "param" if (name, "param") in readers[0].keys() else "frozen"  # noqa: SIM118
        before, after = (reader.read(name, key, 0, numel).astype(np.float64) for reader in readers)
        norm = float(np.linalg.norm(before))
        changes.append((float(np.linalg.norm(after - before)) / norm if norm else 0.0, name))
    changes.sort(reverse=True)
    return table(
        f"step {one} to {other} of {store.shown()}: |change| / |weights|",
        [(name, f"{change:.3e}") for change, name in changes],
    )


def _manifest(store: Store, step: int) -> Manifest:
    steps = {
        (manifests.parse_folder(name) or (0, 0))[0]: name
        for name in reversed(discovery.committed(store))
    }
    if step not in steps:
        raise CheckpointError(
            f"step {step}: not among the checkpoints of {store.shown()}; there are "
            f"{', '.join(str(found) for found in sorted(steps)) or 'none'}; give one of them"
        )
    return discovery.load_manifest(store, steps[step])


def is_run(store: Store) -> bool:
    """Tell whether a run has begun at `store`."""
    return store.exists(STORED)


def _run(url: str) -> Store:
    store = Store(url)
    if not store.exists(STORED):
        raise DataError(
            f"{store.shown()}: is no run (it has no {STORED}); the folder <run.storage>/<run.name> is "
            "needed; dist-ft runs list STORAGE names them"
        )
    return store


def _first(items: Sequence[T]) -> Iterator[tuple[bool, T]]:
    return ((number == 0, item) for number, item in enumerate(items))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
