"""The network check on real ranks: three machines in namespaces of their own, one with a slow link, which is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import namespaces
import pytest
import ranks
import tiny

NAMES = ("alpha", "beta", "gamma")


@pytest.mark.parametrize("marked", [pytest.param(None, marks=namespaces.MARKS)])
def test_a_node_with_a_slow_link_is_named_and_training_goes_on(tmp_path: Path, marked: None) -> None:
    base = tiny.base(tmp_path, samples=20)
    document = tiny.config(base, "net", workers=3, schedule={"epochs": None, "steps": 2, "warmup_steps": 0},
                           checkpoint={"every_steps": 0}, cluster={"network_check": "auto"})
    with namespaces.star(3) as machines:
        namespaces.throttle(machines[1][0], "80mbit", 2**20)
        each = [{"NETNS": name, "MASTER_ADDR": machines[0][1], "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                 "GLOO_SOCKET_IFNAME": namespaces.LINK, "DIST_FT_NODE": NAMES[number]} for number, (name, _) in enumerate(machines)]
        processes = ranks.start_ranks(3, [document], base / "ranks", each=each)
        ranks.require_ok([process.wait(200) for process in processes], base / "ranks")
    log = (base / "ranks/rank-0.log").read_text()
    print(log[-2500:])
    found = json.loads((base / "runs/net/network.json").read_text())
    assert found["nodes"] == list(NAMES) and [(link["one"], link["other"]) for link in found["links"]] == [
        (0, 1), (0, 2), (1, 2)]
    slow, other = [link["mb_s"] for link in found["links"] if 1 in (link["one"], link["other"])], found["links"][1]["mb_s"]
    assert max(slow) < 15 < other, "80 Mbit/s are 10 MB/s"
    assert len(found["slow"]) == 1 and found["slow"][0].startswith("node beta is slow to 2 of 2 other nodes: ")
    assert "WARNING network: node beta is slow to 2 of 2 other nodes" in log
    assert found["seconds"] < 30 and len(found["machines"]) == 3 and found["sums"][0]["mb_s"] > 0


def test_an_interface_a_node_does_not_have_is_one_line(tmp_path: Path) -> None:
    base = tiny.base(tmp_path, samples=20)
    document = tiny.config(base, "net", workers=2, schedule={"epochs": None, "steps": 2, "warmup_steps": 0},
                           cluster={"network_interface": "nope0"})
    program = ("import json, sys\nfrom dist_ft.config.load import load_config\nfrom dist_ft.runtime import local\n"
               "local.run(load_config(json.loads(sys.argv[1])))")
    done = subprocess.run([sys.executable, "-c", program, json.dumps(document)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "DIST_FT_NODE": "here", "DS_ACCELERATOR": "cpu"})
    assert done.returncode == 1 and "cluster.network_interface=nope0: node here has no nope0; it has lo" in done.stderr
