"""Nodes of a Ray cluster (`ray.nodes()`) by the names that people and messages use. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Any

ID_LENGTH = 8
"""Characters of a node's id in its name (`driver._worker_context`)."""


def matching_nodes(nodes: Iterable[Mapping[str, Any]], names: Container[str]) -> set[str]:
    """Return the ids of the alive nodes (`ray.nodes()`) that have one of `names`.

    A host name alone names all nodes of that host.
    """
    return {node["NodeID"] for node in alive(nodes) if any(name in names for name in _names(node))}


def failed_nodes(nodes: Iterable[Mapping[str, Any]], names: Iterable[str]) -> set[str]:
    """Return the ids of the alive nodes that failures by the name `host/id` are about.

    A host whose Ray was started anew has another id; it is recognized by its name, unless several
    nodes share it.
    """
    living = list(alive(nodes))
    hosts = Counter(node.get("NodeManagerHostname", "") for node in living)
    ids = set()
    for name in names:
        host, _, short_id = name.rpartition("/")
        for node in living:
            is_same_id = bool(short_id) and node["NodeID"].startswith(short_id)
            is_only_one = (
                bool(host) and node.get("NodeManagerHostname") == host and hosts[host] == 1
            )
            if is_same_id or is_only_one:
                ids.add(node["NodeID"])
    return ids


def alive(nodes: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """Return the nodes that are not lost."""
    return (node for node in nodes if node["Alive"])


def node_name(node: Mapping[str, Any]) -> str:
    """Return the name of a node in messages."""
    return f"{node.get('NodeManagerHostname', '')}/{node['NodeID'][:ID_LENGTH]}"


def _names(node: Mapping[str, Any]) -> list[str]:
    """Return all names of a node: host, address, id, and the one in messages."""
    return [
        node.get("NodeManagerHostname", ""),
        node.get("NodeManagerAddress", ""),
        node["NodeID"],
        node["NodeID"][:ID_LENGTH],
        node_name(node),
    ]
