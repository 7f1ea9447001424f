"""A Ray cluster of several nodes on this machine, whose nodes a test adds and kills; run as a program it is that cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


class Nodes:
    """The test's side. Nodes are numbered as they are added; the head has no CPU to give."""

    def __init__(self, env: dict[str, str] | None = None) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True, env={**environment, **(env or {})})
        self.address = self._answer()

    def add(self, cpus: float = 1) -> int:
        """Add a node and return its number."""
        return int(self._ask(f"add {cpus}"))

    def kill(self, number: int) -> None:
        """End a node's processes as a lost machine would: no good-bye."""
        self._ask(f"kill {number}")

    def close(self) -> None:
        """End the cluster."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("= "):
                return line[2:].strip()
        raise AssertionError("the cluster has ended")


def main() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 2**27})
    nodes: list[Any] = []
    print(f"= {cluster.address}", flush=True)
    for line in sys.stdin:
        what, value = line.split()
        if what == "add":
            nodes.append(cluster.add_node(num_cpus=float(value), object_store_memory=2**27))
            print(f"= {len(nodes) - 1}", flush=True)
        else:
            cluster.remove_node(nodes[int(value)], allow_graceful=False)
            print("= killed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
