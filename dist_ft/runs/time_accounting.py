"""The accounts of time that attempts left in a run's storage, read for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from dist_ft.core.errors import StorageError
from dist_ft.planning import goodput
from dist_ft.planning.goodput import Account
from dist_ft.storage.filesystem import Store
from dist_ft.training import time_ledger
from dist_ft.training.console import duration


def accounts(store: Store) -> tuple[list[Account], list[str]]:
    """Return what the attempts of the run at `store` wrote down, and a line for each file that can not be used."""
    found, broken = [], []
    for name in store.list(time_ledger.FOLDER):
        path = f"{time_ledger.FOLDER}/{name}"
        try:
            told = json.loads(store.read(path))
            begun_at = datetime.fromisoformat(told["begun_at"]).timestamp()
            found.append(
                Account(
                    int(told["attempt"]),
                    begun_at,
                    told["resumed_at"],
                    dict(told["seconds"]),
                    tuple((int(step), dict(then)) for step, then in told["marks"]),
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            broken.append(f"{path} can not be used ({type(error).__name__}: {error})")
    return found, broken


def read(store: Store, name: str) -> dict[str, Any]:
    """Return one account as it is written; nothing if it can not be read just now."""
    try:
        found = json.loads(store.read(f"{time_ledger.FOLDER}/{name}"))
        return found if isinstance(found, dict) else {}
    except (ValueError, StorageError):
        return {}


def lines(store: Store) -> Iterator[str]:
    """Yield where the wall time of a run went: a line for all of it, then one for each part."""
    found, broken = accounts(store)
    yield from broken
    if not found:
        return
    seconds = goodput.spent(found)
    wall_s = sum(seconds.values())
    yield (
        f"{duration(wall_s)} over {len(found)} attempt{'s' if len(found) != 1 else ''}, "
        f"{goodput.attributed(seconds):.1%} attributed"
    )
    for part, meaning in goodput.PARTS.items():
        yield f"{part:<10} {seconds[part] / wall_s if wall_s else 0:6.1%} {seconds[part]:12,.1f} s  {meaning}"


def stall_s(found: list[Account]) -> float | None:
    """Return how long training stood still for a save, on average over the saves of the first attempt but its last.

    The last is left out: it may be the end's, which is waited for. None: there were fewer than two.
    """
    marks = found[0].marks if found else ()
    return marks[-1][1].get("save", 0.0) / (len(marks) - 1) if len(marks) > 1 else None
