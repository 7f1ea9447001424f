"""Whether a cluster can hold a run, how long the driver waits, and how Ray's failures are
explained."""

from __future__ import annotations

import pytest
from unit.small import run_config

from dist_ft.core.errors import Interrupted, WorkerError
from dist_ft.runtime.ray_backend.placement import (
    assign_nodes,
    explain_ray_failure,
    gpu_index,
    has_labels,
    num_workers_that_fit,
    reason_to_stop_waiting,
    require_resources,
    worker_resources,
)


def config(**cluster):
    return run_config("runs", cluster={"workers": 2, **cluster})


class Cluster:
    """Replaces the ray module: only its resources are read."""

    def __init__(self, **resources: float) -> None:
        self._resources = resources

    def cluster_resources(self) -> dict[str, float]:
        return self._resources


def test_resources_of_a_worker():
    assert worker_resources(config(cpus_per_worker=0.5)) == {"CPU": 0.5}
    assert worker_resources(config(gpus_per_worker=1, resources_per_worker={"fast": 2})) == {
        "CPU": 1,
        "GPU": 1.0,
        "fast": 2,
    }


def test_cluster_that_is_too_small_is_an_error():
    require_resources(Cluster(CPU=2), config())
    require_resources(Cluster(CPU=1), config(workers=[1, 4]))
    require_resources(Cluster(), config(wait_for_nodes=True))
    with pytest.raises(WorkerError) as caught:
        require_resources(Cluster(CPU=1), config())
    assert str(caught.value) == (
        "cluster.workers=2: the workers need 2 CPU, the cluster has 1; lower cluster.workers or "
        "cluster.cpus_per_worker, add nodes, or set cluster.wait_for_nodes=true if an autoscaler adds them"
    )
    with pytest.raises(WorkerError, match="the workers need 2 GPU, the cluster has 0"):
        require_resources(Cluster(CPU=8), config(gpus_per_worker=1))


def test_avoided_nodes_hold_no_workers():
    class Nodes(Cluster):
        def nodes(self):
            return [
                {
                    "NodeID": name * 28,
                    "NodeManagerHostname": name,
                    "Alive": True,
                    "Resources": {"CPU": 1.0},
                }
                for name in ("a1", "b2", "c3")
            ]

    cluster = Nodes(CPU=3)
    require_resources(cluster, config(avoid_nodes=["a1"]))
    with pytest.raises(WorkerError) as caught:
        require_resources(cluster, config(avoid_nodes=["a1", "b2"]))
    assert str(caught.value) == (
        "cluster.avoid_nodes=[a1, b2]: the other 1 nodes have room for 1 workers, but 2 are "
        "needed; avoid fewer nodes, add nodes, or set cluster.wait_for_nodes=true if an "
        "autoscaler adds them"
    )


def test_wait_for_workers_is_bounded():
    busy = config(start_timeout_s=30)
    assert reason_to_stop_waiting(busy, 30, None, False) is None
    error = reason_to_stop_waiting(busy, 31, None, False)
    assert isinstance(error, WorkerError)
    assert str(error) == (
        "cluster.start_timeout_s=30: no worker started within that time; 2 workers are needed, with 1 CPU each, "
        "and the cluster is busy or pulls images slowly; free resources, raise it, or set cluster.wait_for_nodes=true to wait without limit"
    )
    assert reason_to_stop_waiting(busy, 10**6, 119, False) is None, (
        "lost workers get time to be replaced"
    )
    assert "the workers were lost, and none has started for 121 s" in str(
        reason_to_stop_waiting(busy, 10**6, 121, False)
    )
    for silent_s in (None, 10.0**6):
        assert reason_to_stop_waiting(config(wait_for_nodes=True), 10**6, silent_s, False) is None


def test_stop_does_not_wait_if_no_worker_runs():
    assert isinstance(
        reason_to_stop_waiting(config(wait_for_nodes=True), 1, None, True), Interrupted
    )
    assert isinstance(reason_to_stop_waiting(config(), 900, 61, True), Interrupted)
    assert reason_to_stop_waiting(config(), 900, 5, True) is None, "it saves and exits"


def test_failure_of_ray_is_explained_in_one_line():
    remedy = (
        "see the Ray logs in /tmp/x/logs; saved checkpoints are kept; run the same command to "
        "resume"
    )
    failure = RuntimeError("Training failed\nmany lines\nthe last one")
    assert str(explain_ray_failure(failure, config(), "/tmp/x/logs")) == (
        f"run r: the workers failed (the last one); {remedy}"
    )
    assert str(explain_ray_failure(RuntimeError(), config(), "/tmp/x/logs")) == (
        f"run r: the workers failed (RuntimeError); {remedy}"
    )
    assert str(explain_ray_failure(None, config(), "/tmp/x/logs")) == (
        f"run r: the workers ended without a result; {remedy}"
    )


def test_gpu_index_among_those_that_the_node_shares(monkeypatch):
    assert gpu_index([], 3) == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert [gpu_index([gpu], 0) for gpu in (4, "6", 7)] == [0, 1, 2]
    assert gpu_index(["MIG-1"], 2) == 2


def test_workers_are_assigned_to_nodes():
    assert assign_nodes({"a": 4, "b": 8, "c": 2}, 6, 4) == ["a"] * 4 + ["c"] * 2
    assert assign_nodes({"a": 8, "b": 8}, 8, 4) == ["a"] * 4 + ["b"] * 4, (
        "a node is used once, even if all fit on it"
    )
    assert assign_nodes({"a": 8, "b": 3}, 8, 4) is None
    assert assign_nodes({}, 1, 1) is None
    assert (
        num_workers_that_fit({"CPU": 7, "GPU": 3}, {"CPU": 1, "GPU": 1.0}) == 3
        and num_workers_that_fit({"CPU": 1}, {"CPU": 0.1}) == 10
    )
    assert num_workers_that_fit({}, {"CPU": 1}) == 0


def test_labels_match_rays_selectors():
    labels = {"region": "eu", "kind": "H100"}
    for selectors in (
        {},
        {"region": "eu"},
        {"kind": "in(A100, H100)"},
        {"region": "!us"},
        {"absent": "!x"},
        {"kind": "!in(A100, L4)"},
    ):
        assert has_labels(labels, selectors), selectors
    for selectors in (
        {"region": "us"},
        {"kind": "in(A100)"},
        {"region": "!eu"},
        {"absent": "x"},
        {"kind": "!in(H100,L4)"},
    ):
        assert not has_labels(labels, selectors), selectors


class Nodes(Cluster):
    def __init__(self, *nodes: dict) -> None:
        super().__init__(CPU=100)
        self._nodes = nodes

    def nodes(self) -> list[dict]:
        return [{"Alive": True, "Labels": {}, **node} for node in self._nodes]


def test_missing_nodes_are_an_error():
    eight = {"Resources": {"CPU": 8}}
    require_resources(Nodes(eight, eight), config(workers=16, workers_per_node=8))
    with pytest.raises(WorkerError) as caught:
        require_resources(
            Nodes(eight, {**eight, "Alive": False}), config(workers=16, workers_per_node=8)
        )
    assert str(caught.value) == (
        "cluster.workers_per_node=8: 16 workers need 2 nodes with room for 8 each, the cluster has 1; "
        "lower it, add nodes, or set cluster.wait_for_nodes=true if an autoscaler adds them"
    )
    with pytest.raises(WorkerError) as caught:
        require_resources(
            Nodes(eight, {**eight, "Labels": {"disk": "nvme"}}),
            config(workers=9, labels={"disk": "nvme"}),
        )
    assert str(caught.value) == (
        "cluster.labels={'disk': 'nvme'}: 1 of 2 nodes have these labels, with room for 8 workers, but 9 are "
        "needed; correct the labels, add nodes, or set cluster.wait_for_nodes=true if an autoscaler adds them"
    )
