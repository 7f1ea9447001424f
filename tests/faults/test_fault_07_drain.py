"""Fault 7: a node is to be taken away and Ray says so; then a new one comes. Nothing is saved but for these two events."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import history
import nodes
import pytest
import ranks
import tiny
import yaml
from nodes import step, wait_for, worlds

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
NEVER, NOTICE_S = 10**6, 20


def document(base: Path, name: str, steps: int, **cluster: Any) -> dict[str, Any]:
    return tiny.config(
        base,
        name,
        workers=2,
        schedule={"epochs": None, "steps": steps, "name": "constant"},
        checkpoint={"every_steps": NEVER},
        optimizer={"learning_rate": 1e-4},
        cluster={"cpus_per_worker": 1, "resize_interval_s": 10, "standby": False, **cluster},
    )


def shown(log: Path, until: str = "\0") -> list[int]:
    """Return the steps the terminal has shown, in their order, before it said `until`."""
    return [
        int(found)
        for found in re.findall(
            r"step +(\d+)/", log.read_text(errors="replace").partition(until)[0]
        )
    ]


def going_on(log: Path) -> list[int]:
    """Return the steps that attempts went on from."""
    return [
        int(found)
        for found in re.findall(r"going on from step (\d+)", log.read_text(errors="replace"))
    ]


def test_fault_7_a_drained_node_and_a_resize_cost_no_step_from_before_the_notice(
    tmp_path: Path,
) -> None:
    base = tiny.base(tmp_path)
    config, run, log = (
        document(base, "drained", NEVER, workers=[2, 3]),
        base / "runs/drained",
        base / "drained.log",
    )
    (base / "drained.yaml").write_text(yaml.safe_dump(config))
    cluster = nodes.Nodes()
    try:
        there = [cluster.add() for _ in range(3)]
        with open(log, "w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "dist_ft.cli", "train", str(base / "drained.yaml")],
                stdout=out,
                stderr=out,
                cwd=base,
                text=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "DS_ACCELERATOR": "cpu",
                    "RAY_ADDRESS": cluster.address,
                },
            )
        try:
            wait_for(process, lambda: len(shown(log)) > 20)
            assert worlds(run) == [3] and step(run) == 0, "nothing is saved"
            noticed, at = shown(log)[-1], time.monotonic()
            cluster.drain(there[2], NOTICE_S)
            wait_for(process, lambda: step(run) >= noticed, NOTICE_S)
            print(
                f"notice at step {noticed}; step {step(run)} committed {time.monotonic() - at:.1f} s after"
            )
            assert (
                "(worker" in log.read_text() and "saving now, training goes on" in log.read_text()
            )
            time.sleep(max(0.0, at + NOTICE_S - time.monotonic()))
            last, kept = shown(log)[-1], step(run)
            cluster.kill(there[2])
            wait_for(process, lambda: worlds(run)[-1:] == [2] and len(going_on(log)) > 0)
            print(
                f"gone at step {last}; with 2 workers from step {going_on(log)[-1]} after "
                f"{time.monotonic() - at - NOTICE_S:.1f} s"
            )
            assert going_on(log)[-1] == kept > noticed, "saved again as time ran out"
            wait_for(process, lambda: shown(log)[-1] > last + 5)
            cluster.add()
            wait_for(process, lambda: worlds(run)[-1:] == [3] and going_on(log)[-1] > kept)
            begun = going_on(log)[-1]
            before = shown(log, "workers is about to change")[-1]
            print(f"resize announced at step {before}, with 3 workers from step {begun}")
            assert begun >= before > last, "what was done before the resize is not done again"
            wait_for(process, lambda: shown(log)[-1] > begun + 5)
            process.terminate()
            assert process.wait(120) == 130, log.read_text()[-3000:]
        finally:
            process.kill()
            process.wait()
    finally:
        cluster.close()
    print("worlds:", worlds(run))
    causes = [
        json.loads(path.read_text()).get("after", "")
        for path in sorted((run / "attempts").glob("*.json"))
    ]
    assert (
        causes[0] == ""
        and causes[-1] == "planned: more workers joined"
        and "was taken away, as announced" in causes[1]
    ), causes
    end = step(run)
    fixed = document(base, "fixed", end)
    ranks.require_ok(ranks.run_ranks(2, [fixed], base / "ranks", timeout_s=300), base / "ranks")
    history.require_same(run, base / "runs/fixed")
