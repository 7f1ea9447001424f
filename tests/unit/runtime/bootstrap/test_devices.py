"""Devices: named, checked against what was assigned, and idle GPUs reported."""

from __future__ import annotations

import pytest
import torch
from unit.small import run_config

from dist_ft.core.errors import WorkerError
from dist_ft.runtime.bootstrap import devices


def config(workers=0, gpus=0):
    return run_config("runs", cluster={"workers": workers, "gpus_per_worker": gpus})


def test_the_cpu_is_named():
    assert devices.describe_device(config(), 1) == "CPU"
    assert devices.describe_device(config(4), 4) == "4 workers on CPUs"


def test_the_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert devices.describe_device(config(1, 1), 1) == "GPU 3, NVIDIA H200"
    assert devices.describe_device(config(8, 1), 8) == "8 workers with a GPU each, NVIDIA H200"


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="torch is built with CUDA")
def test_a_gpu_with_a_torch_for_cpus_is_refused():
    with pytest.raises(WorkerError) as caught:
        devices.require_device(0)
    assert "assigned GPU 0" in str(caught.value)
    assert "is built without CUDA. Install a CUDA build" in str(caught.value)


@pytest.mark.parametrize(
    ("count", "index", "visible", "message"),
    [
        (0, 0, "", "assigned GPU 0 of CUDA_VISIBLE_DEVICES='', but torch sees no GPU"),
        (2, 2, "4,5", "GPU 2 of CUDA_VISIBLE_DEVICES='4,5', but torch sees 2 GPUs. Start at most"),
        (2, 2, None, "assigned GPU 2, but torch sees 2 GPUs. Start at most one process for each"),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, count, index, visible, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(WorkerError, match=message):
        devices.require_device(index)
    if count:
        devices.require_device(count - 1)


def test_idle_gpus_of_this_machine_are_named(monkeypatch):
    assert devices.idle_here(config()) == ""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.idle_here(config(0, 1)) == (
        "this machine has 2 GPUs, and the run uses 1. Set cluster.workers=2 to use all, if the lanes "
        "allow it"
    )
    assert devices.idle_here(config(2, 1), 2) == ""
    assert devices.idle_here(config()) == (
        "this machine has 2 GPUs, and the run trains on its CPU. Set cluster.gpus_per_worker=1 to "
        "train on them"
    )


def test_idle_gpus_of_a_cluster_are_named():
    free = {"b": 8.0, "a": 4.0}
    assert devices.idle_in_cluster(config(2), free) == (
        "the cluster has 12 free GPUs (a 4, b 8), and the workers train on CPUs. Set "
        "cluster.gpus_per_worker=1 to train on them"
    )
    assert "and the run uses 2 of them. Raise cluster.workers=2" in devices.idle_in_cluster(
        config(2, 1), free
    )
    assert devices.idle_in_cluster(config(12, 1), free) == ""
    assert devices.idle_in_cluster(config(2), {}) == ""


def test_free_gpus_are_those_of_alive_nodes():
    nodes = [
        {"Alive": True, "NodeManagerHostname": "a", "NodeID": "1" * 8, "Resources": {"GPU": 2.0}},
        {"Alive": True, "NodeManagerHostname": "b", "NodeID": "2" * 8, "Resources": {"CPU": 2.0}},
        {"Alive": False, "NodeManagerHostname": "c", "NodeID": "3" * 8, "Resources": {"GPU": 8.0}},
    ]
    assert devices.free_gpus_by_node(nodes, {"GPU": 2.0}) == {"a": 2.0}
    # others use some, and Ray does not say where
    assert devices.free_gpus_by_node(nodes, {"GPU": 1.0}) == {"all nodes together": 1.0}


def test_a_shortage_says_what_is_free():
    total, free = {"GPU": 4.0}, {"GPU": 1.0}
    assert devices.shortage(config(2, 1), total, free) == (
        "waiting for GPUs: 2 workers need 2, and 1 of 4 are free; other jobs use the rest. Wait, "
        "end one of them, or lower cluster.workers"
    )
    assert devices.shortage(config(1, 1), total, free) == ""
    assert devices.shortage(config(2), total, {}) == ""
