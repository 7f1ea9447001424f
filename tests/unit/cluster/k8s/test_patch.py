"""JSON patches, and components built from them."""

from __future__ import annotations

import pytest

from dist_ft.cluster.k8s.patch import Component, Patch, apply_component

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
    return apply_component(BEFORE, Component("", [Patch("X", ops, name)]))[1]["spec"]


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
def test_operations_change_a_copy(op, field, value):
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
def test_missing_paths_are_errors_as_in_kustomize(op):
    with pytest.raises((KeyError, IndexError)):
        spec(op)


def test_patch_changes_one_object_or_all_of_a_kind():
    op = {"op": "add", "path": "/spec/new", "value": 1}
    assert [
        "new" in one.get("spec", {})
        for one in apply_component(BEFORE, Component("", [Patch("X", [op], "a")]))
    ] == [False, True, False]
    assert [
        "new" in one.get("spec", {})
        for one in apply_component(BEFORE, Component("", [Patch("X", [op])]))
    ] == [False, True, True]


def test_objects_that_share_a_value_are_changed_separately():
    """Two containers share a securityContext; a capability added to one is not added to the other."""
    shared = {"drop": ["ALL"]}
    both = [{"kind": "X", "metadata": {"name": "a"}, "one": shared, "two": shared}]
    (after,) = apply_component(
        both,
        Component("", [Patch("X", [{"op": "add", "path": "/one/add", "value": ["IPC_LOCK"]}])]),
    )
    assert after["two"] == {"drop": ["ALL"]}


def test_namespace_moves_with_its_objects():
    moved = apply_component(BEFORE, Component("", namespace="m"))
    assert moved[0]["metadata"] == {"name": "m"} and [
        one["metadata"]["namespace"] for one in moved[1:]
    ] == ["m", "m"]
