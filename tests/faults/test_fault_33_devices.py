"""Fault 33: GPUs that a run leaves idle are named, and workers get the GPUs that are theirs.

The nodes pretend to have GPUs, so what runs on them ends where torch would use one.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nodes
import pytest
import tiny
import torch
import yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]
OTHER_JOB = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(num_gpus=1, num_cpus=0)
class Holder:
    def gpu(self):
        return ray.get_gpu_ids()[0]

holder = Holder.remote()
print(ray.get(holder.gpu.remote()), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("devices"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[nodes.Nodes]:
    """A cluster with a node that has two GPUs."""
    cluster = nodes.Nodes()
    try:
        cluster.add(cpus=4, gpus=2)
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def taken(cluster: nodes.Nodes) -> Iterator[str]:
    """The GPU that another job holds."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER_JOB, cluster.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(60)


def train(base: Path, cluster: nodes.Nodes, name: str, **values: Any) -> tuple[int, str]:
    """Return exit code and output of a run."""
    document = tiny.config(
        base,
        name,
        workers=values.pop("workers", 1),
        schedule={"epochs": None, "steps": 2},
        cluster={
            "cpus_per_worker": 1,
            "address": cluster.address,
            "standby": False,
            "start_timeout_s": 25,
            **values,
        },
    )
    path = base / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    ended = subprocess.run(
        [sys.executable, "-m", "dist_ft.cli", "train", str(path), "--skip-check"],
        capture_output=True,
        text=True,
        cwd=base,
        timeout=300,
    )
    return ended.returncode, ended.stdout + ended.stderr


def test_fault_33_idle_gpus_are_named(base: Path, cluster: nodes.Nodes) -> None:
    code, text = train(base, cluster, "idle")
    assert code == 0, text
    joined = " ".join(text.split())
    assert "the cluster has 2 free GPUs (" in joined
    assert "and the workers train on CPUs. Set cluster.gpus_per_worker=1 to train on them" in joined
    assert "device 1 workers on CPUs" in joined or "device CPU" in joined


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="torch is built with CUDA")
def test_fault_33_a_worker_gets_the_gpu_that_is_free(
    base: Path, cluster: nodes.Nodes, taken: str
) -> None:
    assert taken in ("0", "1")
    code, text = train(base, cluster, "free", gpus_per_worker=1)
    joined = " ".join(text.split())
    free = "1" if taken == "0" else "0"
    assert code != 0
    assert f"assigned GPU 0 of CUDA_VISIBLE_DEVICES='{free}', but torch" in joined
    assert "is built without CUDA" in joined
    assert "step 1/2" not in joined, "it trained on another device"


def test_fault_33_a_run_that_waits_for_gpus_says_so(
    base: Path, cluster: nodes.Nodes, taken: str
) -> None:
    code, text = train(base, cluster, "waits", workers=2, gpus_per_worker=1)
    joined = " ".join(text.split())
    assert code != 0
    assert "waiting for GPUs: 2 workers need 2, and 1 of 2 are free" in joined
    assert "no worker started within that time" in joined
