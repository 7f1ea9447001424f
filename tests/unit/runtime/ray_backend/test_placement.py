"""What is asked of a cluster, and what is made of its failures."""

from __future__ import annotations

import pytest
from unit.small import run_config

from dist_ft.core.errors import Interrupted, WorkerError
from dist_ft.runtime.ray_backend.placement import (
    by_node,
    device,
    explain,
    given_up,
    has_labels,
    require_resources,
    resources,
    rooms,
)


def config(**cluster):
    return run_config("runs", cluster={"workers": 2, **cluster})


class Cluster:
    """Stands where the ray module stands: it is asked for its resources only."""

    def __init__(self, **resources: float) -> None:
        self._resources = resources

    def cluster_resources(self) -> dict[str, float]:
        return self._resources


def test_resources_of_a_worker():
    assert resources(config(cpus_per_worker=0.5)) == {"CPU": 0.5}
    assert resources(config(gpus_per_worker=1, resources_per_worker={"fast": 2})) == {
        "CPU": 1,
        "GPU": 1.0,
        "fast": 2,
    }


def test_a_cluster_that_is_too_small():
    require_resources(Cluster(CPU=2), config())
    require_resources(Cluster(CPU=1), config(workers=[1, 4]))
    require_resources(Cluster(), config(wait_for_nodes=True))
    with pytest.raises(WorkerError) as caught:
        require_resources(Cluster(CPU=1), config())
    assert str(caught.value) == (
        "cluster.workers=2: they need 2 CPU, the cluster has 1; lower cluster.workers or cluster.cpus_per_worker, add "
        "nodes, or set cluster.wait_for_nodes=true if an autoscaler will"
    )
    with pytest.raises(WorkerError, match="they need 2 GPU, the cluster has 0"):
        require_resources(Cluster(CPU=8), config(gpus_per_worker=1))


def test_waiting_for_workers_has_an_end():
    busy = config(start_timeout_s=30)
    assert given_up(busy, 30, None, False) is None
    error = given_up(busy, 31, None, False)
    assert isinstance(error, WorkerError)
    assert str(error) == (
        "cluster.start_timeout_s=30: no worker has started in that time; 2 are needed, of 1 CPU each, and the cluster is "
        "busy, or its images are slow; free resources, raise it, or set cluster.wait_for_nodes=true to wait without limit"
    )
    assert given_up(busy, 10**6, 119, False) is None, (
        "workers that were lost get time to be replaced"
    )
    assert "the workers were lost, and none has started for 121 s" in str(
        given_up(busy, 10**6, 121, False)
    )
    for silent_s in (None, 10.0**6):
        assert given_up(config(wait_for_nodes=True), 10**6, silent_s, False) is None


def test_who_asks_to_stop_while_no_worker_is_there_does_not_wait():
    assert isinstance(given_up(config(wait_for_nodes=True), 1, None, True), Interrupted)
    assert isinstance(given_up(config(), 900, 61, True), Interrupted)
    assert given_up(config(), 900, 5, True) is None, "it saves and leaves"


def test_what_ray_itself_fails_with_is_one_line():
    kept = "see the Ray logs in /tmp/ray; what was committed is kept; the same command goes on from there"
    assert str(explain(RuntimeError("Training failed\nmany lines\nthe last one"), config())) == (
        f"run r: the workers failed (the last one); {kept}"
    )
    assert (
        str(explain(RuntimeError(), config()))
        == f"run r: the workers failed (RuntimeError); {kept}"
    )
    assert str(explain(None, config())) == f"run r: the workers ended without a result; {kept}"


def test_the_gpu_of_a_worker_among_those_its_node_shares(monkeypatch):
    assert device([], 3) == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert [device([gpu], 0) for gpu in (4, "6", 7)] == [0, 1, 2]
    assert device(["MIG-1"], 2) == 2


def test_workers_by_node():
    assert by_node({"a": 4, "b": 8, "c": 2}, 6, 4) == ["a"] * 4 + ["c"] * 2
    assert by_node({"a": 8, "b": 8}, 8, 4) == ["a"] * 4 + ["b"] * 4, (
        "a node once, though it has room for all"
    )
    assert by_node({"a": 8, "b": 3}, 8, 4) is None
    assert by_node({}, 1, 1) is None
    assert (
        rooms({"CPU": 7, "GPU": 3}, {"CPU": 1, "GPU": 1.0}) == 3
        and rooms({"CPU": 1}, {"CPU": 0.1}) == 10
    )
    assert rooms({}, {"CPU": 1}) == 0


def test_labels_as_rays_selectors():
    labels = {"region": "eu", "kind": "H100"}
    for wanted in (
        {},
        {"region": "eu"},
        {"kind": "in(A100, H100)"},
        {"region": "!us"},
        {"absent": "!x"},
        {"kind": "!in(A100, L4)"},
    ):
        assert has_labels(labels, wanted), wanted
    for wanted in (
        {"region": "us"},
        {"kind": "in(A100)"},
        {"region": "!eu"},
        {"absent": "x"},
        {"kind": "!in(H100,L4)"},
    ):
        assert not has_labels(labels, wanted), wanted


class Nodes(Cluster):
    def __init__(self, *nodes: dict) -> None:
        super().__init__(CPU=100)
        self._nodes = nodes

    def nodes(self) -> list[dict]:
        return [{"Alive": True, "Labels": {}, **node} for node in self._nodes]


def test_nodes_a_cluster_does_not_have():
    eight = {"Resources": {"CPU": 8}}
    require_resources(Nodes(eight, eight), config(workers=16, workers_per_node=8))
    with pytest.raises(WorkerError) as caught:
        require_resources(
            Nodes(eight, {**eight, "Alive": False}), config(workers=16, workers_per_node=8)
        )
    assert str(caught.value) == (
        "cluster.workers_per_node=8: 16 workers need 2 nodes with room for so many, the cluster has 1; lower it, add "
        "nodes, or set cluster.wait_for_nodes=true if an autoscaler will"
    )
    with pytest.raises(WorkerError) as caught:
        require_resources(
            Nodes(eight, {**eight, "Labels": {"disk": "nvme"}}),
            config(workers=9, labels={"disk": "nvme"}),
        )
    assert str(caught.value) == (
        "cluster.labels={'disk': 'nvme'}: 1 of 2 nodes have them, with room for 8 workers, and 9 are needed; correct the "
        "labels, add nodes, or set cluster.wait_for_nodes=true if an autoscaler will"
    )
