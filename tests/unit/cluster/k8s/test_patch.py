"""JSON patches, and parts made of them."""

from __future__ import annotations

import pytest

from dist_ft.cluster.k8s.patch import Part, Patch, applied

BEFORE = [
    {"kind": "Namespace", "metadata": {"name": "n"}},
    {
        "kind": "X",
        "metadata": {"name": "a", "namespace": "n"},
        "spec": {"list": [1, 2], "a/b": 1, "~": 2},
    },
    {"kind": "X", "metadata": {"name": "b", "namespace": "n"}, "spec": {"list": [1]}},
]


def spec(*ops, name="a"):
    return applied(BEFORE, Part("", [Patch("X", ops, name)]))[1]["spec"]


@pytest.mark.parametrize(
    ("op", "field", "value"),
    [
        ({"op": "add", "path": "/spec/list/-", "value": 3}, "list", [1, 2, 3]),
        ({"op": "add", "path": "/spec/list/0", "value": 3}, "list", [3, 1, 2]),
        ({"op": "replace", "path": "/spec/list/1", "value": 3}, "list", [1, 3]),
        ({"op": "remove", "path": "/spec/list/0"}, "list", [2]),
        ({"op": "replace", "path": "/spec/a~1b", "value": 3}, "a/b", 3),
        ({"op": "replace", "path": "/spec/~0", "value": 3}, "~", 3),
        ({"op": "add", "path": "/spec/new", "value": {}}, "new", {}),
    ],
)
def test_operations(op, field, value):
    assert spec(op)[field] == value
    assert BEFORE[1]["spec"] == {"list": [1, 2], "a/b": 1, "~": 2}


@pytest.mark.parametrize(
    "op",
    [
        {"op": "replace", "path": "/spec/no", "value": 1},
        {"op": "remove", "path": "/spec/list/7"},
        {"op": "add", "path": "/no/way", "value": 1},
    ],
)
def test_paths_that_lead_nowhere_are_errors_as_in_kustomize(op):
    with pytest.raises((KeyError, IndexError)):
        spec(op)


def test_a_part_of_one_object_and_of_all():
    op = {"op": "add", "path": "/spec/new", "value": 1}
    assert [
        "new" in one.get("spec", {}) for one in applied(BEFORE, Part("", [Patch("X", [op], "a")]))
    ] == [False, True, False]
    assert [
        "new" in one.get("spec", {}) for one in applied(BEFORE, Part("", [Patch("X", [op])]))
    ] == [False, True, True]


def test_objects_that_share_a_value_are_changed_apart():
    """Two containers made with the same securityContext: a capability for one is none for the other."""
    shared = {"drop": ["ALL"]}
    both = [{"kind": "X", "metadata": {"name": "a"}, "one": shared, "two": shared}]
    (after,) = applied(
        both, Part("", [Patch("X", [{"op": "add", "path": "/one/add", "value": ["IPC_LOCK"]}])])
    )
    assert after["two"] == {"drop": ["ALL"]}


def test_a_namespace_moves_with_all_that_is_in_it():
    moved = applied(BEFORE, Part("", namespace="m"))
    assert moved[0]["metadata"] == {"name": "m"} and [
        one["metadata"]["namespace"] for one in moved[1:]
    ] == ["m", "m"]
