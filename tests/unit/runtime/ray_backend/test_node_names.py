"""Nodes by the names that people and messages use."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.runtime.ray_backend.node_names import failed_nodes, matching_nodes, node_name


def node(host: str, short_id: str, address: str = "10.0.0.1", alive: bool = True) -> dict[str, Any]:
    return {
        "NodeID": short_id + "0" * 48,
        "NodeManagerHostname": host,
        "NodeManagerAddress": address,
        "Alive": alive,
        "Resources": {"CPU": 2.0},
        "Labels": {},
    }


ONE, TWO = node("one", "11111111"), node("two", "22222222", "10.0.0.2")
SHARED = [node("same", "33333333"), node("same", "44444444")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("two", [TWO]),
        ("10.0.0.2", [TWO]),
        (TWO["NodeID"], [TWO]),
        ("22222222", [TWO]),
        ("two/22222222", [TWO]),
        ("same", SHARED),
        ("tw", []),
        ("2222", []),
        ("", []),
    ],
)
def test_node_is_found_by_each_of_its_names(name: str, expected: list[dict[str, Any]]) -> None:
    nodes = [ONE, TWO, *SHARED]
    assert matching_nodes(nodes, {name}) == {found["NodeID"] for found in expected}
    assert matching_nodes([node("two", "22222222", alive=False)], {name}) == set()


def test_name_in_messages() -> None:
    assert node_name(TWO) == "two/22222222"


def test_failed_node_is_found_by_its_id_or_as_the_only_node_of_its_host() -> None:
    assert failed_nodes([ONE, TWO], ["two/22222222"]) == {TWO["NodeID"]}
    restarted = node("two", "99999999")
    assert failed_nodes([ONE, restarted], ["two/22222222"]) == {restarted["NodeID"]}
    assert failed_nodes(SHARED, ["same/33333333"]) == {SHARED[0]["NodeID"]}, "not the other"
    assert failed_nodes(SHARED, ["same/55555555"]) == set(), "another node of the host, lost since"
    assert failed_nodes([ONE], ["three/12345678"]) == set()
    assert failed_nodes([ONE], ["", "here"]) == set()
