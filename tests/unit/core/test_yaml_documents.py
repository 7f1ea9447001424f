"""YAML of others: bounded in size, depth and aliases, within seconds."""

from __future__ import annotations

import time

import pytest
import yaml

from dist_ft.core import yaml_documents
from dist_ft.core.yaml_documents import CONFIG, MANIFESTS, MAX_DEPTH, parse_yaml, reason

LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{chr(98 + level)}: &{chr(98 + level)} [{', '.join([f'*{chr(97 + level)}'] * 9)}]\n"
    for level in range(12)
)
MERGES = "a: &a {k0: 1, k1: 1, k2: 1, k3: 1}\n" + "".join(
    f"{chr(98 + level)}: &{chr(98 + level)}\n  <<: [{', '.join([f'*{chr(97 + level)}'] * 9)}]\n"
    for level in range(12)
)
REFUSED = {
    "laughs": (LAUGHS, "more than 50,000 values"),
    "merges": (MERGES, "more than 50,000 values"),
    "recursive list": ("a: &a [*a]", r"alias \*a contains itself"),
    "recursive mapping": ("&a {b: {c: *a}}", r"alias \*a contains itself"),
    "recursive key": ("&a {? *a : 1}", r"alias \*a contains itself"),
    "recursive merge": ("a: &a\n  <<: *a\n", r"alias \*a contains itself"),
    "unknown alias": ("a: *b", "undefined alias"),
    "deep flow": ("[" * 100_000, f"nested more than {MAX_DEPTH} deep"),
    "deep mappings": ("{a: " * 100_000, f"nested more than {MAX_DEPTH} deep"),
    "deep blocks": (
        "".join(" " * level + "a:\n" for level in range(500)),
        f"nested more than {MAX_DEPTH} deep",
    ),
    "deep dashes": ("- " * 50_000 + "a", f"nested more than {MAX_DEPTH} deep"),
    "many values": ("[" + "1," * 200_000 + "]", "more than 50,000 values"),
    "large": ("a: " + "x" * CONFIG.num_bytes, "larger than 1 MiB"),
    "object": ("!!python/object/apply:os.system [id]", "could not determine a constructor"),
    "own tag": ("a: !mine 1", "could not determine a constructor"),
    "bool": ("a: !!bool perhaps", "not a valid bool"),
    "time": ("a: !!timestamp never", "not a valid timestamp"),
    "month": ("a: 2024-13-45", "not a valid timestamp"),
    "int": ("a: !!int ''", "not a valid int"),
    "float": ("a: !!float ''", "not a valid float"),
    "digits": ("a: " + "9" * 5000, "a number of more than 100 characters"),
    "sexagesimal": ("a: 1" + ":59" * 5000, "a number of more than 100 characters"),
    "hexadecimal": ("a: 0x" + "f" * 5000, "a number of more than 100 characters"),
    "NUL": ("a: \0", "special characters are not allowed"),
    "escape": ("a: \x1b[31m", "special characters are not allowed"),
    "torn": ("a: {b: 1", "expected ',' or '}'"),
    "list as key": ("? [1, 2]\n: 3", "found unhashable key"),
}


@pytest.mark.parametrize(("text", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_refused_soon(text: str, expected: str) -> None:
    started = time.monotonic()
    with pytest.raises(yaml.YAMLError) as caught:
        parse_yaml(text)

    assert time.monotonic() - started < 10
    import re

    assert re.search(expected, reason(caught.value)), reason(caught.value)
    assert "\n" not in reason(caught.value)


def test_aliases_and_merges_of_usual_size_are_read() -> None:
    text = "base: &base {a: 1, b: [1, 2]}\nother:\n  <<: *base\n  a: 2\nlist: [*base, *base]\n"
    values, problems = parse_yaml(text)
    base = {"a": 1, "b": [1, 2]}
    assert values == [{"base": base, "other": {**base, "a": 2}, "list": [base, base]}]
    assert not problems


def test_an_anchor_may_be_used_again_in_the_next_document() -> None:
    values, _ = parse_yaml("a: &x [1]\nb: *x\n---\na: &x {c: 2}\nb: *x\n")
    assert values == [{"a": [1], "b": [1]}, {"a": {"c": 2}, "b": {"c": 2}}]


def test_duplicate_keys_are_reported_at_every_level() -> None:
    _, problems = parse_yaml("a: 1\nb:\n  c: 1\n  c: 2\na: 2\n---\nd: 1\nd: 1\n")
    assert problems == [
        "line 5: duplicate key 'a' (first in line 1). Each key is allowed once. Remove one.",
        "line 4: duplicate key 'c' (first in line 3). Each key is allowed once. Remove one.",
        "line 8: duplicate key 'd' (first in line 7). Each key is allowed once. Remove one.",
    ] or sorted(problems) == sorted(set(problems))
    assert len(problems) == 3


def test_numbers_without_a_dot_are_numbers() -> None:
    values, _ = parse_yaml("[1e-5, 2E3, 1.5, 0x10, 1_000, text1e5]")
    assert values == [[1e-5, 2e3, 1.5, 16, 1000, "text1e5"]]


def test_no_document_is_no_value() -> None:
    assert parse_yaml("").values == []
    assert parse_yaml("# only a comment\n").values == []


def test_large_manifests_have_larger_bounds() -> None:
    text = "items: [" + ", ".join(["{a: 1}"] * 20_000) + "]"
    with pytest.raises(yaml.YAMLError, match="more than"):
        parse_yaml(text)
    assert len(parse_yaml(text, MANIFESTS).values[0]["items"]) == 20_000


def test_bounds_hold_within_the_time_of_a_command() -> None:
    # As many values as are allowed, as text of many small lines.
    text = "".join(f"key{number}: value\n" for number in range(CONFIG.num_values // 2 - 2))
    started = time.monotonic()
    assert len(parse_yaml(text).values[0]) == CONFIG.num_values // 2 - 2
    assert time.monotonic() - started < 10
    assert yaml_documents.where(ValueError()) == ""


def test_yaml_for_reports_has_no_tag_and_the_same_value() -> None:
    value = {
        "name": "<script>alert(1)</script>",
        "<b>": ["a < b", "\\x3C", 'quoted "<"', "plain", 1, None],
        "long": "<i> " + "word " * 60,
        "lines": "a\n<b>\n",
    }
    text = yaml_documents.dump_without_tags(value)
    assert "<" not in text
    assert parse_yaml(text).values == [value]
    assert "plain" in text and '"plain"' not in text
