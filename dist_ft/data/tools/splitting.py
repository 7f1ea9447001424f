"""Split rows into named sets, or draw a few examples per label, by seed.

n is the number of rows, S the number of splits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dist_ft.core.errors import DataError
from dist_ft.core.seeds import derive_seed, random_uint64
from dist_ft.data.sources.discovery import Row


def split_rows(
    rows: Sequence[Row],
    shares: Mapping[str, float],
    seed: int = 0,
    by: str | None = None,
    group: str | None = None,
) -> dict[str, list[Row]]:
    """Return rows in splits of `shares` (which sum to 1), each in the original order of the rows.

    Args:
        rows: all rows.
        shares: {name: share}.
        seed: decides which rows are in which split.
        by: column whose values have the same shares in every split (stratified), or None.
        group: column whose rows of one value stay together (articles, users), or None; not with
            `by`.

    Raises:
        DataError: shares that are not above 0 or do not sum to 1, or a missing column.
    """
    # Not `>` and `<=`, which are false for NaN.
    is_valid = abs(sum(shares.values()) - 1) <= 1e-6 and all(share > 0 for share in shares.values())
    if not is_valid:
        values = ", ".join(f"{name}={share:g}" for name, share in shares.items())
        raise DataError(
            f"shares: {values} sum to {sum(shares.values()):g}. Each must be above 0 and their "
            "sum 1. Correct them."
        )

    edges = np.cumsum(list(shares.values()))  # (S,)
    if group is not None:
        split_numbers = _assign_groups(rows, edges, seed, group)
    else:
        split_numbers = _assign_stratified(rows, edges, seed, by)

    splits: dict[str, list[Row]] = {name: [] for name in shares}
    members = list(splits.values())
    for row, number in zip(rows, split_numbers.tolist(), strict=True):
        members[number].append(row)
    return splits


def _assign_groups(rows: Sequence[Row], edges: np.ndarray, seed: int, group: str) -> np.ndarray:
    """Return the split number of each row; groups are shuffled and stay whole.

    A group is in the split in which its first row would be.
    """
    # Shuffled groups are laid out over [0, 1); where a group starts decides its split.
    groups = list(group_rows(rows, group, "--group").values())
    order = np.argsort(random_uint64(derive_seed(seed), len(groups)), kind="stable").tolist()
    sizes = [len(groups[number]) for number in order]
    starts = np.cumsum([0, *sizes])[:-1] / max(1, len(rows))

    # the sum of the shares may be just below 1, hence the `min`
    split_numbers = np.zeros(len(rows), dtype=np.int64)
    splits = np.searchsorted(edges, starts, side="right")
    for number, split in zip(order, splits, strict=True):
        split_numbers[groups[number]] = min(int(split), len(edges) - 1)
    return split_numbers


def _assign_stratified(
    rows: Sequence[Row], edges: np.ndarray, seed: int, by: str | None
) -> np.ndarray:
    """Return the split number of each row; each value of the column `by` is split by itself."""
    split_numbers = np.zeros(len(rows), dtype=np.int64)  # (n,)
    for value, indices in group_rows(rows, by).items():
        shuffled = _shuffle(indices, seed, value)

        # A row's position is in the middle of its slot in [0, 1), shifted by seed: small groups get
        # their shares in sum.
        shift = (derive_seed(seed, *_to_numbers(value)) >> 11) / 2**52
        positions = (np.arange(len(shuffled)) + shift % 1) / max(1, len(shuffled))
        splits = np.searchsorted(edges, positions, side="right")
        split_numbers[shuffled] = np.minimum(splits, len(edges) - 1)

    return split_numbers


def sample_per_label(
    rows: Sequence[Row], count: int, seed: int = 0, by: str = "label"
) -> list[Row]:
    """Return `count` rows of each value of the column `by`, drawn by seed, in their original order.

    The rows of a smaller count are among those of a larger one.

    Raises:
        DataError: a value has fewer rows.
    """
    drawn: list[int] = []
    for value, indices in group_rows(rows, by).items():
        if len(indices) < count:
            raise DataError(
                f"--per-label={count}: {by}={value} has only {len(indices)} rows. Set at most "
                "that number."
            )

        # The order does not depend on `count`: more examples extend the fewer.
        drawn += _shuffle(indices, seed, value)[:count].tolist()

    return [rows[index] for index in sorted(drawn)]


def group_rows(rows: Sequence[Row], by: str | None, option: str = "--by") -> dict[str, list[int]]:
    """Return the indices of rows by the value of a column; all in one group without a column.

    Args:
        rows: all rows.
        by: the column, or None.
        option: the command-line option of the column; errors name it.
    """
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        if by is not None and by not in row:
            raise DataError(
                f"{option}={by}: row {index + 1} has no such column. Choose one of "
                f"{', '.join(row)}."
            )

        value = ""
        if by is not None:
            value = str(row[by])
        groups.setdefault(value, []).append(index)

    return groups


def _shuffle(indices: list[int], seed: int, value: str) -> np.ndarray:
    """Return the indices of the rows of one value, shuffled by seed and value."""
    # by value too: values of equal counts would otherwise be shuffled alike
    hashes = random_uint64(derive_seed(seed, *_to_numbers(value)), len(indices))
    return np.array(indices, dtype=np.int64)[np.argsort(hashes, kind="stable")]


def _to_numbers(value: str) -> list[int]:
    """Return a text as integers, for `derive_seed`."""
    # not `hash`, which differs between processes
    return list(value.encode("utf-8", "surrogatepass"))
