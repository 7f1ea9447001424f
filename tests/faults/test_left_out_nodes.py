"""Nodes that fail again and again, and nodes that the config names, get no workers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import history
import nodes
import pytest
import ranks
import tiny
import yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
SLOW = {"DIST_FT_FAILPOINT": "train.step:*!sleep0.4"}
"""Variables of a healthy node, where steps take a while."""


def faulty(hit: int = 8) -> dict[str, str]:
    """Return variables of a node on which each process ends by SIGSEGV at its `hit`-th step."""
    return {"DIST_FT_FAILPOINT": f"train.step:{hit}!fault"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("left-out"), samples=70)


def document(base: Path, name: str, steps: int = 24, **cluster: Any) -> dict[str, Any]:
    return tiny.config(
        base,
        name,
        workers=2,
        schedule={"epochs": None, "steps": steps, "name": "constant"},
        checkpoint={"every_steps": 4},
        cluster={
            "cpus_per_worker": 1,
            "standby": False,
            "network_check": "on",
            "resize_interval_s": 5,
            **cluster,
        },
    )


@contextmanager
def started(base: Path, config: dict[str, Any], address: str) -> Iterator[subprocess.Popen[str]]:
    """Run `dist-ft train`; its output goes to NAME.log."""
    name = config["run"]["name"]
    path = base / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    with open(base / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dist_ft.cli", "train", str(path)],
            stdout=log,
            stderr=log,
            cwd=base,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                "RAY_ADDRESS": address,
            },
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finish(process: subprocess.Popen[str], base: Path, name: str) -> str:
    """Return the output of a run that must end with exit code 0."""
    code = process.wait(500)
    output = (base / f"{name}.log").read_text()
    assert code == 0, output[-4000:]
    assert "Traceback" not in output, output[-4000:]
    return output


def ends(run: Path) -> list[str]:
    """Return why the attempts of a run ended, except the last."""
    notes = [json.loads(path.read_text()) for path in sorted((run / "attempts").glob("*.json"))]
    return [note.get("after", "") for note in notes[1:]]


def name_of(cluster: nodes.Nodes, number: int) -> str:
    """Return the name of a node in messages."""
    return f"{socket.gethostname()}/{cluster.node_id(number)[:8]}"


def require_same_losses(base: Path, run: str, config: dict[str, Any]) -> None:
    """Fail unless the run has the losses of one without faults."""
    fixed = json.loads(json.dumps(config))
    fixed["run"]["name"] = f"{run}-fixed"
    fixed["cluster"] = {"workers": 2}
    folder = base / f"{run}-ranks"
    ranks.require_ok(ranks.run_ranks(2, [fixed], folder, timeout_s=400), folder)
    history.require_same(base / "runs" / run, base / "runs" / f"{run}-fixed")


def test_node_that_failed_twice_is_replaced_by_another(base: Path) -> None:
    config, run = document(base, "replaced", exclude_node_after=2), base / "runs/replaced"
    cluster = nodes.Nodes()
    try:
        bad = cluster.add(env=faulty())
        cluster.add(env=SLOW)
        name = name_of(cluster, bad)
        with started(base, config, cluster.address) as process:
            # Only now, so that the first workers are on the faulty node.
            nodes.wait_for(process, lambda: nodes.world_sizes(run) == [2])
            cluster.add(env=SLOW)
            output = finish(process, base, "replaced")
    finally:
        cluster.close()
    assert f"node {name} failed 2 times within a day (crash, crash; " in output
    assert output.count("it is left out, and gets no more workers") == 1
    crashes = [end for end in ends(run) if "crash (by SIGSEGV)" in end]
    # the second crash may be noted only by leaving the node out
    assert len(crashes) in (1, 2) and all(f"on node {name}:" in end for end in crashes)
    assert ends(run)[-1].startswith("planned: ") and f"on node {name} is left out" in ends(run)[-1]
    assert nodes.world_sizes(run)[-1] == 2
    assert name not in json.loads((run / "network.json").read_text())["nodes"]
    require_same_losses(base, "replaced", config)


def test_elastic_run_continues_without_the_node(base: Path) -> None:
    config = document(base, "shrunk", steps=60, workers=[1, 2], exclude_node_after=1)
    run = base / "runs/shrunk"
    cluster = nodes.Nodes()
    try:
        cluster.add(env=faulty())
        cluster.add(env=SLOW)
        with started(base, config, cluster.address) as process:
            output = finish(process, base, "shrunk")
    finally:
        cluster.close()
    assert "it is left out, and gets no more workers" in output
    sizes = nodes.world_sizes(run)
    assert sizes[0] == 2 and sizes[-1] == 1, sizes
    assert 2 not in sizes[sizes.index(1) :], "a resize does not count the node that is left out"
    require_same_losses(base, "shrunk", config)


def test_node_without_which_there_is_no_room_is_used_again(base: Path) -> None:
    config = document(base, "kept", steps=14, exclude_node_after=1)
    run = base / "runs/kept"
    cluster = nodes.Nodes()
    try:
        cluster.add(env=faulty())
        cluster.add(env=SLOW)
        with started(base, config, cluster.address) as process:
            output = finish(process, base, "kept")
    finally:
        cluster.close()
    assert "but without it there is no room for 2 workers: it is used again" in output
    assert len(ends(run)) == 2 and set(nodes.world_sizes(run)) == {2}
    require_same_losses(base, "kept", config)


def test_failures_before_a_new_start_of_the_driver_count(base: Path) -> None:
    """The second driver reads from the records of attempts what the node did under the first."""
    config, run = document(base, "again", exclude_node_after=2), base / "runs/again"
    cluster = nodes.Nodes()
    try:
        bad = cluster.add(env=faulty())
        cluster.add(env=SLOW)
        name = name_of(cluster, bad)
        with started(base, config, cluster.address) as process:
            nodes.wait_for(process, lambda: len(nodes.world_sizes(run)) == 3)
            process.kill()
            process.wait()
        cluster.add(env=SLOW)
        with started(base, config, cluster.address) as process:
            output = finish(process, base, "again")
    finally:
        cluster.close()
    assert f"node {name} failed 2 times within a day" in output and "it is left out" in output
    assert "SIGSEGV" not in output, "it got no worker again"
    assert name not in json.loads((run / "network.json").read_text())["nodes"]
    require_same_losses(base, "again", config)


def test_avoided_node_gets_no_workers(base: Path) -> None:
    cluster = nodes.Nodes()
    try:
        bad = cluster.add(env=faulty(1))
        cluster.add(env=SLOW)
        cluster.add(env=SLOW)
        name, config = name_of(cluster, bad), document(base, "avoided", steps=6)
        config["cluster"]["avoid_nodes"] = [cluster.node_id(bad)]
        with started(base, config, cluster.address) as process:
            finish(process, base, "avoided")
    finally:
        cluster.close()
    run = base / "runs/avoided"
    assert nodes.world_sizes(run) == [2]
    assert name not in json.loads((run / "network.json").read_text())["nodes"]
