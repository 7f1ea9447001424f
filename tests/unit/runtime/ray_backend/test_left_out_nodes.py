"""Which nodes are left out, and when they are used again."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
from unit.small import run_config

from dist_ft.checkpoint.attempt_records import AttemptRecord
from dist_ft.config.schema import RunConfig
from dist_ft.runtime.elastic.node_failures import NodeFailure
from dist_ft.runtime.ray_backend import left_out_nodes
from dist_ft.runtime.ray_backend.left_out_nodes import (
    WINDOW_S,
    NodeExclusion,
    choose_left_out,
    earlier_failures,
    num_possible_workers,
    selectors,
)


def node(name: str, cpus: float = 1, labels: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "NodeID": name * 28,
        "NodeManagerHostname": "host",
        "NodeManagerAddress": "10.0.0.1",
        "Alive": True,
        "Resources": {"CPU": cpus},
        "Labels": labels or {},
    }


A, B, C = node("a1"), node("b2"), node("c3")
NAME_A, NAME_B = "host/a1a1a1a1", "host/b2b2b2b2"


class Ray:
    def __init__(self, *nodes: dict[str, Any]) -> None:
        self.found = list(nodes)

    def nodes(self) -> list[dict[str, Any]]:
        return self.found


def config(**cluster: Any) -> RunConfig:
    return run_config("runs", cluster={"workers": 2, **cluster})


@pytest.mark.parametrize(
    ("cluster", "nodes", "candidates", "expected"),
    [
        ({}, [A, B, C], [A], [A]),
        ({}, [A, B, C], [A, B], [A]),
        ({}, [A, B], [A], []),
        ({"workers": [1, 2]}, [A, B], [A], [A]),
        ({"workers": [1, 2]}, [A, B], [B, A], [B]),
        ({}, [A, node("d4", cpus=2)], [A], [A]),
        ({"placement": "STRICT_SPREAD"}, [A, node("d4", cpus=2)], [A], []),
        ({"placement": "STRICT_PACK"}, [A, B, C], [A], []),
        ({"placement": "STRICT_PACK"}, [A, node("d4", cpus=2)], [A], [A]),
        ({"workers_per_node": 2}, [node("d4", 2), node("e5", 2)], [node("d4", 2)], [node("d4", 2)]),
        ({"workers_per_node": 2}, [node("d4", 2), B, C], [node("d4", 2)], []),
        ({"labels": {"disk": "ssd"}}, [A, B, node("d4", 2, {"disk": "ssd"})], [A], [A]),
    ],
)
def test_others_must_hold_the_smallest_number_of_workers(
    cluster: dict[str, Any],
    nodes: list[dict[str, Any]],
    candidates: list[dict[str, Any]],
    expected: list[dict[str, Any]],
) -> None:
    chosen = choose_left_out(nodes, config(**cluster), [one["NodeID"] for one in candidates])
    assert chosen == [one["NodeID"] for one in expected]


def test_avoided_nodes_hold_nobody_anyway() -> None:
    nodes = [A, B, C]
    assert choose_left_out(nodes, config(), [A["NodeID"]], avoided={C["NodeID"]}) == []


def test_selector_of_a_worker() -> None:
    assert selectors(config(), []) == {}
    assert selectors(config(labels={"disk": "ssd"}), ["b", "a"]) == {
        "disk": "ssd",
        "ray.io/node-id": "!in(a, b)",
    }
    pinned = config(labels={"ray.io/node-id": "x"})
    assert selectors(pinned, ["a"]) == {"ray.io/node-id": "x"}, "the user chose the node"


def test_workers_of_an_elastic_run() -> None:
    reserved, free = {"a": 1, "b": 1}, {"a": 0, "b": 1, "c": 1, "d": 3}
    assert num_possible_workers(reserved, free, {"a"}, most=2) == 2, "c or d instead of a"
    assert num_possible_workers(reserved, {"b": 1}, {"a"}, most=2) == 1
    assert num_possible_workers(reserved, free, {"a"}, most=9) == 5
    assert num_possible_workers({}, {}, set(), most=9) == 0


class Exclusion:
    """A `NodeExclusion`, and what it reported."""

    def __init__(self, ray: Ray, run: RunConfig, earlier: tuple[NodeFailure, ...] = ()) -> None:
        self.reported: list[list[str]] = []
        self.target = NodeExclusion(ray, run, self.reported.append, earlier)

    def fail(self, name: str, times: int = 1, kind: str = "crash") -> None:
        failures = [NodeFailure(name, kind, time.time()) for _ in range(times)]
        self.target.check(failures, silent_s=1.0)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(logging.getLogger("dist_ft"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records]


def test_node_that_failed_often_enough_is_left_out_in_one_line(lines: Any) -> None:
    exclusion = Exclusion(Ray(A, B, C), config(exclude_node_after=2))
    exclusion.fail(NAME_A)
    assert exclusion.reported == [] and lines() == []
    exclusion.fail(NAME_A, kind="hang")
    assert exclusion.reported == [[NAME_A]]
    assert lines() == [
        "node host/a1a1a1a1 failed 2 times within a day (crash, hang; "
        "cluster.exclude_node_after=2): it is left out, and gets no more workers"
    ]
    exclusion.target.check([], silent_s=1.0)
    assert exclusion.reported == [[NAME_A]] and len(lines()) == 1


def test_node_without_which_there_is_no_room_is_used_again(lines: Any) -> None:
    exclusion = Exclusion(Ray(A, B), config(exclude_node_after=2))
    exclusion.fail(NAME_A, times=2)
    assert exclusion.reported == []
    assert lines() == [
        "node host/a1a1a1a1 failed 2 times within a day (crash, crash; "
        "cluster.exclude_node_after=2), but without it there is no room for 2 workers: it is used "
        "again"
    ]


def test_elastic_run_leaves_out_the_worst_first() -> None:
    exclusion = Exclusion(Ray(A, B), config(workers=[1, 2], exclude_node_after=2))
    exclusion.target.check(
        [NodeFailure(NAME_A, "crash", time.time())] * 2
        + [NodeFailure(NAME_B, "crash", time.time())] * 3,
        silent_s=1.0,
    )
    assert exclusion.reported == [[NAME_B]]


def test_failures_of_earlier_starts_count_for_a_day() -> None:
    now = time.time()
    recent = tuple(NodeFailure(NAME_A, "crash", now - 60) for _ in range(2))
    old = tuple(NodeFailure(NAME_A, "crash", now - WINDOW_S - 1) for _ in range(9))
    assert Exclusion(Ray(A, B, C), config(exclude_node_after=2), recent).reported == [[NAME_A]]
    assert Exclusion(Ray(A, B, C), config(exclude_node_after=2), old).reported == []
    assert Exclusion(Ray(A, B, C), config(exclude_node_after=0), recent).reported == []


def test_nodes_are_used_again_if_no_worker_can_be_placed(
    monkeypatch: pytest.MonkeyPatch, lines: Any
) -> None:
    now = 1000.0
    monkeypatch.setattr(left_out_nodes.time, "monotonic", lambda: now)
    exclusion = Exclusion(Ray(A, B, C), config(exclude_node_after=1))
    exclusion.fail(NAME_A)
    now += 151  # half of start_timeout_s
    exclusion.target.check([], silent_s=1.0)
    assert exclusion.reported == [[NAME_A]], "workers run"
    exclusion.target.check([], silent_s=151.0)
    assert exclusion.reported == [[NAME_A], []]
    assert lines()[-1] == "no worker could be placed for 151 s: host/a1a1a1a1 is used again"


def test_failures_are_read_from_the_records_of_attempts() -> None:
    def record(number: int, started_s: float | None, previous_end: str) -> AttemptRecord:
        return AttemptRecord(number, started_s, 1.0, 2, previous_end, False)

    attempts = [
        record(1, 1.0, ""),
        record(2, 2.0, f"worker 1 on node {NAME_A}: crash (by SIGSEGV)"),
        record(3, 3.0, "worker 1 on node x: killed (by SIGKILL, from outside)"),
        record(4, None, f"worker 1 on node {NAME_A}: crash (by SIGSEGV)"),
    ]
    assert earlier_failures(attempts) == [NodeFailure(NAME_A, "crash", 2.0)]
