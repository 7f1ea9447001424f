"""Labels in the order of a head's outputs."""

from __future__ import annotations

from dist_ft.data.encoding.task_rows import sort_labels


def test_labels_are_sorted():
    assert sort_labels(["10", "9", "-1"]) == ("-1", "9", "10")
    assert sort_labels(["I-PER", "B-ORG", "O", "B-PER"]) == ("O", "B-ORG", "B-PER", "I-PER")
    assert sort_labels({"yes", "no"}) == ("no", "yes")


def test_odd_numbers_as_labels_have_one_order():
    """Python refuses to convert thousands of digits; two spellings of a number are two labels."""
    assert sort_labels(["2", "9" * 5000, "1"]) == ("1", "2", "9" * 5000)
    assert sort_labels(["1", "01", "0"]) == ("0", "01", "1")
