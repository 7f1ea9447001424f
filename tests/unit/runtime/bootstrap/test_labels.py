"""Labels of a run: named, or found once in its training data and stored."""

from __future__ import annotations

import json

import pytest

from dist_ft.config.load import load_config
from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.core.errors import ConfigError, DataError
from dist_ft.core.world import Collectives, World
from dist_ft.runtime.bootstrap.labels import LABELS_FILE, resolve_labels
from dist_ft.storage.filesystem import Store


@pytest.fixture
def labels(tmp_path):
    """Return a function: rows, task fields -> labels; and the run's store."""
    store = Store(str(tmp_path / "run"))

    def find(rows, bad_rows="error", **task):
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = load_config(
            {
                "run": {"name": "x"},
                "model": {"path": "m"},
                "data": {"train": str(tmp_path / "x.jsonl"), "bad_rows": bad_rows},
                "schedule": {"steps": 1},
                "batch": {"global_batch": 2, "sequence_length": 32},
                "task": {"name": "sequence_classification", **task},
            }
        )
        return resolve_labels(ResolvedRun.from_config(config), store, World(), Collectives()).labels

    return find, store


def rows(*values):
    return [{"text": "x", "label": value} for value in values]


def test_labels_are_found_sorted_and_stored(labels):
    find, store = labels
    assert find(rows("no", "yes", "no", "maybe")) == ("maybe", "no", "yes")
    assert json.loads(store.read(LABELS_FILE)) == ["maybe", "no", "yes"]
    assert find(rows("other", "data")) == ("maybe", "no", "yes"), (
        "a run keeps the labels it started with"
    )


def test_named_labels_keep_their_order(labels):
    find, store = labels
    assert find(rows("no", "yes"), labels=["yes", "no"]) == ("yes", "no") and not store.exists(
        LABELS_FILE
    )


def test_labels_of_tags(labels):
    find, _ = labels
    assert find([{"tokens": ["a", "b"], "tags": ["O", "B-X"]}], name="token_classification") == (
        "O",
        "B-X",
    )


def test_labels_of_label_sets(labels):
    find, _ = labels
    assert find(rows(["b", "a"], []), name="multi_label") == ("a", "b")


def test_other_tasks_have_no_labels(labels):
    find, _ = labels
    assert find(rows("a"), name="masked_lm") == ()


def test_one_label_is_refused(labels):
    find, store = labels
    with pytest.raises(
        DataError, match=r"its rows have 1 label \(yes\)\. At least two different labels are needed"
    ):
        find(rows("yes", "yes"))
    assert not store.exists(LABELS_FILE)


def test_no_label_is_refused_for_a_head_that_grows(labels):
    find, store = labels
    with pytest.raises(
        DataError, match=r"its rows have 0 labels\. At least one label is needed\. Set"
    ):
        find(rows([], []), name="multi_label", grow_head=True)
    assert not store.exists(LABELS_FILE)


def test_row_without_label_is_refused_or_skipped(labels):
    find, _ = labels
    with pytest.raises(DataError, match=r"row 2: has no column 'label'. Its columns: text"):
        find([*rows("a"), {"text": "x"}, *rows("b")])
    assert find([*rows("a"), {"text": "x"}, *rows("b")], bad_rows="skip") == ("a", "b")


def test_class_weights_need_a_label_each(labels):
    find, _ = labels
    with pytest.raises(
        ConfigError, match=r"task\.class_weights: 2 weights and 3 labels \(a, b, c\)"
    ):
        find(rows("a", "b", "c"), class_weights=[1, 2])
