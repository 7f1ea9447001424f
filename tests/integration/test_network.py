"""The network check on real processes and sockets: three machines in namespaces of their own, one with a slow link."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import namespaces
import ports
import pytest
import tiny

NAMES = ("alpha", "beta", "gamma")
RANK = """
import sys
from dist_ft.core import logs
from dist_ft.config.load import load_config
from dist_ft.runtime.bootstrap import network_check as network
from dist_ft.storage.filesystem import Store
from dist_ft.core.world import World, collectives
import json, os
import torch.distributed as dist
config = load_config(json.loads(sys.argv[1]))
logs.setup_logging(int(os.environ["RANK"]), 3, "info", None)
network.configure_interfaces(config)
dist.init_process_group("gloo")
if sys.argv[3] == "wrong" and os.environ["RANK"] == "2":
    real = dist.all_reduce
    def broken(tensor, *rest, **named):
        real(tensor, *rest, **named)
        if tensor.numel() > 1000:
            tensor[7] += 1
    dist.all_reduce = broken
world = World.from_environment()
network.check(config, world, collectives(world), Store(sys.argv[2]))
os._exit(0)
"""


def check(
    folder: Path, machines: list[dict[str, str]], wrong: str = ""
) -> list[tuple[int | None, str]]:
    """Return exit code and output of the check on three machines."""
    document = tiny.config(
        folder, "net", workers=3, cluster={"network_interface": machines[0]["LINK"]}
    )
    port, running = str(ports.find_free_port()), []
    for number, machine in enumerate(machines):
        inside = ["ip", "netns", "exec", machine["NETNS"]] if "NETNS" in machine else []
        running.append(
            subprocess.Popen(
                [*inside, sys.executable, "-c", RANK, json.dumps(document), str(folder), wrong],
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "RANK": str(number),
                    "WORLD_SIZE": "3",
                    "LOCAL_RANK": "0",
                    "LOCAL_WORLD_SIZE": "1",
                    "MASTER_PORT": port,
                    "MASTER_ADDR": machine["MASTER_ADDR"],
                    "DIST_FT_NODE": NAMES[number],
                    "OMP_NUM_THREADS": "1",
                },
            )
        )
    try:
        return [
            (process.returncode, said)
            for process in running
            for said in [process.communicate(timeout=240)[0]]
        ]
    finally:
        for process in running:
            process.kill()


@pytest.mark.parametrize("marked", [pytest.param(None, marks=namespaces.MARKS)])
def test_a_node_with_a_slow_link_is_named(tmp_path: Path, marked: None) -> None:
    with namespaces.star(3) as machines:
        namespaces.throttle(machines[1][0], "80mbit", 2**20)
        done = check(
            tmp_path,
            [
                {"NETNS": name, "MASTER_ADDR": machines[0][1], "LINK": namespaces.LINK}
                for name, _ in machines
            ],
        )
    print(done[0][1])
    assert [code for code, _ in done] == [0, 0, 0], done
    found = json.loads((tmp_path / "network.json").read_text())
    assert found["nodes"] == list(NAMES) and [
        (link["one"], link["other"]) for link in found["links"]
    ] == [(0, 1), (0, 2), (1, 2)]
    slow, other = (
        [link["mb_s"] for link in found["links"] if 1 in (link["one"], link["other"])],
        found["links"][1]["mb_s"],
    )
    assert max(slow) < 15 < other, "80 Mbit/s are 10 MB/s"
    assert len(found["slow"]) == 1 and found["slow"][0].startswith(
        "node beta is slow to 2 of 2 other nodes: "
    )
    assert "WARNING network: node beta is slow to 2 of 2 other nodes" in done[0][1]
    assert found["seconds"] < 60 and len(found["machines"]) == 3 and found["sums"][0]["mb_s"] > 0


def test_a_wrong_sum_ends_the_run_on_all_ranks(tmp_path: Path) -> None:
    done = check(tmp_path, [{"MASTER_ADDR": "127.0.0.1", "LINK": "lo"}] * 3, "wrong")
    assert all(
        code
        and "network check: a sum over all workers is wrong. Training would be silently wrong"
        in said
        for code, said in done
    ), done
    assert not (tmp_path / "network.json").exists()


def test_missing_network_interface_is_one_line(tmp_path: Path) -> None:
    base = tiny.base(tmp_path, samples=20)
    document = tiny.config(base, "net", workers=2, cluster={"network_interface": "nope0"})
    program = (
        "import json, sys\nfrom dist_ft.config.load import load_config\nfrom dist_ft.runtime import local\n"
        "local.run(load_config(json.loads(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(document)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "DIST_FT_NODE": "here", "DS_ACCELERATOR": "cpu"},
    )
    assert (
        done.returncode == 1
        and "cluster.network_interface=nope0: node here has no interface nope0. It has lo"
        in done.stderr
    )
