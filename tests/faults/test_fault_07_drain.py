"""Fault 7: Ray announces the removal of a node; later a new one joins. Only these two events
cause saves."""

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
from nodes import latest_step, wait_for, world_sizes

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


def shown_steps(log: Path, until: str = "\0") -> list[int]:
    """Return the steps shown on the terminal, in order, up to the text `until`."""
    return [
        int(found)
        for found in re.findall(
            r"step +(\d+)/", log.read_text(errors="replace").partition(until)[0]
        )
    ]


def resumed_steps(log: Path) -> list[int]:
    """Return the steps that attempts resumed from."""
    return [
        int(found)
        for found in re.findall(r"resuming from step (\d+)", log.read_text(errors="replace"))
    ]


def test_fault_7_drained_node_and_resize_cost_no_step_from_before_the_notice(
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
        node_ids = [cluster.add() for _ in range(3)]
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
            wait_for(process, lambda: len(shown_steps(log)) > 20)
            assert world_sizes(run) == [3] and latest_step(run) == 0, "nothing is saved"
            notice_step, at = shown_steps(log)[-1], time.monotonic()
            cluster.drain(node_ids[2], NOTICE_S)
            wait_for(process, lambda: latest_step(run) >= notice_step, NOTICE_S)
            print(
                f"notice at step {notice_step}; step {latest_step(run)} committed "
                f"{time.monotonic() - at:.1f} s after"
            )
            assert (
                "(worker" in log.read_text() and "saving now; training continues" in log.read_text()
            )
            time.sleep(max(0.0, at + NOTICE_S - time.monotonic()))
            last, saved = shown_steps(log)[-1], latest_step(run)
            cluster.kill(node_ids[2])
            wait_for(process, lambda: world_sizes(run)[-1:] == [2] and len(resumed_steps(log)) > 0)
            print(
                f"gone at step {last}; with 2 workers from step {resumed_steps(log)[-1]} after "
                f"{time.monotonic() - at - NOTICE_S:.1f} s"
            )
            assert resumed_steps(log)[-1] == saved > notice_step, "saved again as time ran out"
            wait_for(process, lambda: shown_steps(log)[-1] > last + 5)
            cluster.add()
            wait_for(
                process, lambda: world_sizes(run)[-1:] == [3] and resumed_steps(log)[-1] > saved
            )
            start_step = resumed_steps(log)[-1]
            before = shown_steps(log, "workers is about to change")[-1]
            print(f"resize announced at step {before}, with 3 workers from step {start_step}")
            assert start_step >= before > last, "no step before the resize is repeated"
            wait_for(process, lambda: shown_steps(log)[-1] > start_step + 5)
            process.terminate()
            assert process.wait(120) == 130, log.read_text()[-3000:]
        finally:
            process.kill()
            process.wait()
    finally:
        cluster.close()
    print("worlds:", world_sizes(run))
    causes = [
        json.loads(path.read_text()).get("after", "")
        for path in sorted((run / "attempts").glob("*.json"))
    ]
    assert (
        causes[0] == ""
        and causes[-1] == "planned: more workers joined"
        and "was taken away, as announced" in causes[1]
    ), causes
    end = latest_step(run)
    fixed = document(base, "fixed", end)
    ranks.require_ok(ranks.run_ranks(2, [fixed], base / "ranks", timeout_s=300), base / "ranks")
    history.require_same(run, base / "runs/fixed")
