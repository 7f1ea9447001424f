"""Labels in the order of a head's outputs."""

from __future__ import annotations

from dist_ft.data.encoding.task_rows import sort_labels


def test_labels_are_sorted():
    assert sort_labels(["10", "9", "-1"]) == ("-1", "9", "10")
    assert sort_labels(["I-PER", "B-ORG", "O", "B-PER"]) == ("O", "B-ORG", "B-PER", "I-PER")
    assert sort_labels({"yes", "no"}) == ("no", "yes")
