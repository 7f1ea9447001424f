"""Fault 8: nodes that go and come, on a Ray cluster of several nodes: 4 workers, 3, 2, and 4 again in one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import history
import nodes
import numpy as np
import pytest
import ranks
import tiny
import yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]
STEPS = 260


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("nodes"))


def document(base: Path, name: str, **cluster: Any) -> dict[str, Any]:
    return tiny.config(base, name, workers=2, schedule={"epochs": None, "steps": STEPS}, checkpoint={"every_steps": 10},
                       optimizer={"learning_rate": 5e-4},
                       cluster={"cpus_per_worker": 1, "resize_interval_s": 15, "standby": False, **cluster})


def worlds(run: Path) -> list[int]:
    """Return the world size of every attempt so far."""
    return [json.loads(path.read_text())["world_size"] for path in sorted((run / "attempts").glob("*.json"))]


def step(run: Path) -> int:
    """Return the newest committed step."""
    found = [int(path.parent.name.split("-")[1]) for path in (run / "checkpoints").glob("step-*/manifest.json")]
    return max(found, default=0)


def wait_for(process: subprocess.Popen[str], what: Any, timeout_s: float = 240) -> None:
    until = time.monotonic() + timeout_s
    while not what():
        assert process.poll() is None, f"the run ended with {process.returncode}"
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.3)


def test_fault_8_four_workers_three_two_and_four_again_see_the_same_samples(base: Path) -> None:
    fixed = document(base, "fixed")
    ranks.require_ok(ranks.run_ranks(2, [fixed], base / "fixed-ranks", timeout_s=600), base / "fixed-ranks")
    cluster = nodes.Nodes()
    try:
        there = [cluster.add() for _ in range(4)]
        config, run = document(base, "elastic", workers=[2, 4]), base / "runs/elastic"
        path = base / "elastic.yaml"
        path.write_text(yaml.safe_dump(config))
        with open(base / "elastic.log", "w") as log:
            process = subprocess.Popen([sys.executable, "-m", "dist_ft.cli", "train", str(path)], stdout=log, stderr=log,
                                       cwd=base, text=True,
                                       env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                                            "RAY_ADDRESS": cluster.address})
        try:
            for size in (4, 3, 2):
                wait_for(process, lambda size=size: worlds(run)[-1:] == [size])
                begun = step(run)
                wait_for(process, lambda begun=begun: step(run) >= begun + 20)
                if size > 2:
                    lost = time.monotonic()
                    cluster.kill(there[size - 1])
                    wait_for(process, lambda size=size: worlds(run)[-1:] == [size - 1])
                    print(f"node lost to an attempt with {size - 1} workers: {time.monotonic() - lost:.1f} s")
            for _ in range(2):
                cluster.add()
            wait_for(process, lambda: worlds(run)[-1:] == [4])
            assert process.wait(600) == 0, (base / "elastic.log").read_text()[-3000:]
        finally:
            process.kill()
            process.wait()
    finally:
        cluster.close()
    print("worlds:", worlds(run))
    assert [size for size, before in zip(worlds(run), [0, *worlds(run)], strict=False) if size != before] == [4, 3, 2, 4]
    assert history.losses(run) == pytest.approx(history.losses(base / "runs/fixed"), abs=1e-5)
    history.require_exactly_once(run, config)
    own, other = (np.sort(history.ledger(base / "runs" / name), axis=0) for name in ("elastic", "fixed"))
    np.testing.assert_array_equal(own, other)
