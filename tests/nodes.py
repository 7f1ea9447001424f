"""A Ray cluster of several nodes on this machine. A test adds and kills nodes.

Run as a program, this module is the cluster.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import namespaces


class Nodes:
    """The test's side. Nodes are numbered as they are added; the head offers no CPU."""

    def __init__(self, env: dict[str, str] | None = None, address: str | None = None) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *([address] if address else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, **(env or {})},
        )
        self.address = self._read_answer()

    def add(
        self,
        cpus: float = 1,
        place: tuple[str, str] | None = None,
        env: dict[str, str] | None = None,
        gpus: int = 0,
    ) -> int:
        """Add a node and return its number.

        `place`: its (network namespace, address); `env`: variables of all that runs there, without
        spaces; `gpus`: GPUs that it pretends to have.
        """
        variables = [f"{name}={value}" for name, value in (env or {}).items()]
        return int(self._send(f"add {cpus} {' '.join([*(place or ()), *variables])} gpus:{gpus}"))

    def node_id(self, number: int) -> str:
        """Return Ray's id of a node."""
        return self._send(f"id {number}")

    def kill(self, number: int) -> None:
        """Kill a node's processes, as if the machine was lost."""
        self._send(f"kill {number}")

    def drain(self, number: int, seconds: float) -> None:
        """Announce the removal of a node, as a cloud's agent or a preStop hook does; it does not
        `kill`."""
        self._send(f"drain {number} {seconds}")

    def close(self) -> None:
        """End the cluster."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _send(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read_answer()

    def _read_answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("= "):
                return line[2:].strip()
        raise AssertionError("the cluster has ended")


def world_sizes(run: Path) -> list[int]:
    """Return the world size of every attempt so far."""
    return [
        json.loads(path.read_text())["world_size"]
        for path in sorted((run / "attempts").glob("*.json"))
    ]


def latest_step(run: Path) -> int:
    """Return the step of the latest checkpoint."""
    found = [
        int(path.parent.name.split("-")[1])
        for path in (run / "checkpoints").glob("step-*/manifest.json")
    ]
    return max(found, default=0)


def wait_for(
    process: subprocess.Popen[str], condition: Callable[[], bool], timeout_s: float = 240
) -> None:
    """Wait until `condition()`, while the run is running."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"the run ended with {process.returncode}"
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.3)


def drain(address: str, node: str, seconds: float) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

    accepted, reason = GcsClient(address=address).drain_node(
        node, DRAIN_NODE_REASON_PREEMPTION, "a test", int((time.time() + seconds) * 1000)
    )
    assert accepted, reason


def main() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": 2**27,
            **({"node_ip_address": sys.argv[1]} if sys.argv[1:] else {}),
        },
    )
    own_namespace = f"/proc/self/fd/{os.open('/proc/self/ns/net', os.O_RDONLY)}"
    nodes: list[Any] = []
    print(f"= {cluster.address}", flush=True)
    for line in sys.stdin:
        command, value, *more = line.split()
        if command == "add":
            num_gpus = int(more.pop().removeprefix("gpus:"))
            variables = dict(word.split("=", 1) for word in more if "=" in word)
            more = [word for word in more if "=" not in word]
            if more:
                namespaces.enter(namespaces.NETNS_FOLDER + more[0])
            nodes.append(
                cluster.add_node(
                    num_cpus=float(value),
                    num_gpus=num_gpus,
                    object_store_memory=2**27,
                    **({"node_ip_address": more[1]} if more else {}),
                    **({"env_vars": variables} if variables else {}),
                )
            )
            namespaces.enter(own_namespace)
            print(f"= {len(nodes) - 1}", flush=True)
        elif command == "id":
            print(f"= {nodes[int(value)].node_id}", flush=True)
        elif command == "drain":
            drain(cluster.address, nodes[int(value)].node_id, float(more[0]))
            print("= draining", flush=True)
        else:
            cluster.remove_node(nodes[int(value)], allow_graceful=False)
            print("= killed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
