"""Splits and few examples: by seed, in shares, each row in one split."""

from __future__ import annotations

from collections import Counter

import pytest

from dist_ft.core.errors import DataError
from dist_ft.data.tools.splitting import sample_per_label, split_rows

ROWS = [{"n": i, "label": "rare" if i % 10 == 0 else "usual"} for i in range(200)]
SHARES = {"train": 0.8, "test": 0.2}


def test_each_row_is_in_one_split_in_order():
    found = split_rows(ROWS, SHARES, 3)
    assert sorted(row["n"] for rows in found.values() for row in rows) == list(range(200))
    assert [len(rows) for rows in found.values()] == [160, 40]
    assert all(rows == sorted(rows, key=lambda row: row["n"]) for rows in found.values())


def test_stratified_splits_keep_shares():
    found = split_rows(ROWS, SHARES, 3, "label")
    assert Counter(row["label"] for row in found["test"]) == {"rare": 4, "usual": 36}


def test_small_groups_have_their_shares_in_sum():
    rows = [{"label": f"l{i // 3}"} for i in range(900)]
    found = split_rows(rows, {"train": 0.9, "test": 0.1}, 0, "label")
    assert 60 <= len(found["test"]) <= 120


def test_split_depends_on_the_seed():
    assert split_rows(ROWS, SHARES, 3) == split_rows(ROWS, SHARES, 3) != split_rows(ROWS, SHARES, 4)


def test_few_examples_are_nested():
    small, large = sample_per_label(ROWS, 4, 1), sample_per_label(ROWS, 8, 1)
    assert Counter(row["label"] for row in large) == {"rare": 8, "usual": 8}
    assert {row["n"] for row in small} < {row["n"] for row in large}
    with pytest.raises(DataError, match=r"--per-label=30: label=rare has only 20 rows"):
        sample_per_label(ROWS, 30)


def test_bad_shares_and_columns_are_refused():
    with pytest.raises(DataError, match=r"shares: a=0\.5, b=0\.6 sum to 1\.1"):
        split_rows(ROWS, {"a": 0.5, "b": 0.6})
    for share in (float("nan"), float("inf"), -1.0):
        with pytest.raises(DataError, match="Each must be above 0 and their sum 1"):
            split_rows(ROWS, {"a": share, "b": 0.5})
    with pytest.raises(
        DataError, match=r"--by=class: row 1 has no such column. Choose one of n, label"
    ):
        split_rows(ROWS, SHARES, 0, "class")


def test_groups_stay_together():
    rows = [{"n": i, "article": i % 23} for i in range(230)]
    found = split_rows(rows, SHARES, 1, group="article")
    train, test = ({row["article"] for row in found[name]} for name in SHARES)
    assert not train & test and len(found["train"]) + len(found["test"]) == 230
    assert 20 <= len(found["test"]) <= 60 and found != split_rows(rows, SHARES, 2, group="article")
