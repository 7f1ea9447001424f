"""Rows to named splits, and to few examples a label: by seed, and, where there are labels, each in its share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dist_ft.core.errors import DataError
from dist_ft.core.seeds import (
    derive_seed,
    random_uint64,
)
from dist_ft.data.sources.discovery import Row


def split_rows(
    rows: Sequence[Row],
    shares: Mapping[str, float],
    seed: int = 0,
    by: str | None = None,
    group: str | None = None,
) -> dict[str, list[Row]]:
    """Return rows in splits of `shares` (which sum to 1), each in the rows' own order.

    Args:
        rows: all of them.
        shares: {name: share}.
        seed: which rows go where.
        by: column whose values every split has in the same shares (stratified), or None.
        group: column of which rows of one value stay together (articles, users), or None; not with `by`.
    """
    if abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) <= 0:
        raise DataError(
            f"shares: {', '.join(f'{name}={share:g}' for name, share in shares.items())} sum to "
            f"{sum(shares.values()):g}; above 0 and 1 together is allowed; correct them"
        )
    edges = np.cumsum(list(shares.values()))
    chosen = np.zeros(len(rows), dtype=np.int64)
    if group is not None:
        whole = list(group_rows(rows, group, "--group").values())
        order = np.argsort(random_uint64(derive_seed(seed), len(whole)), kind="stable").tolist()
        begins = np.cumsum([0, *(len(whole[number]) for number in order)])[:-1] / max(1, len(rows))
        for number, at in zip(order, np.searchsorted(edges, begins, side="right"), strict=True):
            chosen[whole[number]] = min(int(at), len(edges) - 1)
    for value, places in group_rows(rows, by).items() if group is None else ():
        shuffled = _shuffled(places, seed, value)
        # positions in the middle of their slots, shifted by seed, so that small groups too come to their share in sum
        shift = (derive_seed(seed, *_numbers(value)) >> 11) / 2**52
        at = (np.arange(len(shuffled)) + shift % 1) / max(1, len(shuffled))
        chosen[shuffled] = np.minimum(np.searchsorted(edges, at, side="right"), len(edges) - 1)
    return {
        name: [row for row, own in zip(rows, chosen.tolist(), strict=True) if own == number]
        for number, name in enumerate(shares)
    }


def sample_per_label(rows: Sequence[Row], count: int, seed: int = 0, by: str = "label") -> list[Row]:
    """Return `count` rows of each value of the column `by`, drawn by seed, in the rows' own order.

    Those of a smaller count are among those of a larger one. Raises DataError for a value with fewer rows.
    """
    kept = []
    for value, places in group_rows(rows, by).items():
        if len(places) < count:
            raise DataError(
                f"--per-label={count}: there are {len(places)} rows of {by}={value}; at most as many are "
                "allowed; lower it"
            )
        kept += _shuffled(places, seed, value)[:count].tolist()
    return [rows[place] for place in sorted(kept)]


def group_rows(rows: Sequence[Row], by: str | None, option: str = "--by") -> dict[str, list[int]]:
    """Return the places of rows by the value of a column; all in one without."""
    found: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        if by is not None and by not in row:
            raise DataError(
                f"{option}={by}: row {place + 1} has no such column; there are {', '.join(row)}; name one"
            )
        found.setdefault(str(row[by]) if by is not None else "", []).append(place)
    return found


def _shuffled(places: list[int], seed: int, value: Any) -> np.ndarray:
    order = np.argsort(random_uint64(derive_seed(seed, *_numbers(value)), len(places)), kind="stable")
    return np.array(places, dtype=np.int64)[order]


def _numbers(value: Any) -> list[int]:
    return list(str(value).encode())
