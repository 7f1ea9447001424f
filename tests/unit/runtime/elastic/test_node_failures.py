"""Which node the reason for the end of an attempt points to."""

from __future__ import annotations

import pytest

from dist_ft.runtime.elastic.node_failures import (
    KNOWN_LOSS,
    UNKNOWN_LOSS,
    NodeFailure,
    WorkerPlace,
    name_silent_workers,
    node_failures,
)
from dist_ft.runtime.elastic.restart_policy import Failure

HANG = "no progress within cluster.progress_timeout_s; its stacks are in attempts/ of the run"


@pytest.mark.parametrize(
    ("failure", "nodes"),
    [
        (Failure(1, "a/01", "crash", "by SIGSEGV"), ["a/01"]),
        (Failure(1, "a/01", "crash", "by SIGABRT"), ["a/01"]),
        (Failure(0, "a/01", "out of memory", "out of GPU memory (CUDA)"), ["a/01"]),
        (Failure(2, "b/02", "lost", KNOWN_LOSS), ["b/02"]),
        (Failure(2, "b/02", "lost", UNKNOWN_LOSS), []),
        (Failure(0, "a/01", "error", "worker 1 on node b/02: crash (x)"), []),
        (Failure(0, "a/01", "killed", "by SIGKILL, from outside"), []),
        (Failure(0, "a/01", "storage", "s3://b: no answer"), []),
        (Failure(0, "a/01", "peer", "Connection closed by peer"), []),
        (Failure(0, "a/01", "hang", HANG), []),
        (
            Failure(0, "a/01", "hang", name_silent_workers(HANG, [WorkerPlace(1, "b/02")])),
            ["b/02"],
        ),
        (
            Failure(
                0,
                "a/01",
                "hang",
                name_silent_workers(
                    HANG, [WorkerPlace(1, "b/02"), WorkerPlace(2, "b/02"), WorkerPlace(3, "c/03")]
                ),
            ),
            ["b/02", "c/03"],
        ),
    ],
)
def test_failures_that_point_to_a_node(failure: Failure, nodes: list[str]) -> None:
    found = node_failures(str(failure), 5.0)
    assert found == [NodeFailure(node, failure.kind, 5.0) for node in nodes]


@pytest.mark.parametrize(
    "reason", ["", "planned: worker 1 on node a/01 is left out", "planned: more workers joined"]
)
def test_planned_ends_point_to_no_node(reason: str) -> None:
    assert node_failures(reason, 0.0) == []
