"""Machines in network namespaces that run `ray start` with token authentication, as on rented
nodes.

The first is the head and offers no CPU. The test's own side is the laptop: it submits runs, follows
them, and holds the bucket.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import namespaces
from job_cluster import ROOT, Cluster, RunningCommand

GCS_PORT, JOB_PORT, AGENT_PORT = 6379, 8265, 52365


class Machines:
    """Controls the machines: number 0 is the head, the others are nodes with one CPU.

    Attributes:
        env: environment variables of each machine.
        head: address of the head.
    """

    def __init__(self, places: list[tuple[str, str]], folder: Path) -> None:
        self._places, self._folder = places, folder
        (folder / "token").write_text(secrets.token_hex(32))
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("RAY_", "GLOO_", "AWS_"))
        }
        self.env = {
            **inherited,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        }
        self.head = places[0][1]

    @property
    def laptop(self) -> Cluster:
        """The cluster as the test's own side sees it."""
        url = f"http://{self.head}:{JOB_PORT}"
        return Cluster(url, self._folder, {**self.env, "RAY_API_SERVER_ADDRESS": url})

    def start(self, number: int, timeout_s: float = 120) -> None:
        """Start Ray on a machine, and wait until it has joined the cluster."""
        address = self._places[number][1]
        # Like a machine's /tmp: empty after a start.
        own = Path(tempfile.mkdtemp(prefix=f"{number}-", dir=self._folder))
        head = [
            "--num-cpus=0",
            "--head",
            f"--port={GCS_PORT}",
            f"--dashboard-host={address}",
            f"--dashboard-port={JOB_PORT}",
        ]
        join = ["--num-cpus=1", f"--address={self.head}:{GCS_PORT}"]
        with open(own / "output", "w") as output:
            process = subprocess.Popen(
                [
                    *self._inside(number),
                    "ray",
                    "start",
                    "--block",
                    "--disable-usage-stats",
                    f"--node-ip-address={address}",
                    f"--temp-dir={own}",
                    f"--dashboard-agent-listen-port={AGENT_PORT}",
                    f"--object-store-memory={2**27}",
                    *(join if number else head),
                ],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        until = time.monotonic() + timeout_s
        while "Ray runtime started" not in (text := (own / "output").read_text()):
            assert process.poll() is None and time.monotonic() < until, text[-3000:]
            time.sleep(0.2)

    def drain(self, number: int, seconds: float) -> None:
        """Announce on a machine that it will be taken away, as a pod's preStop hook does."""
        node_id = subprocess.run(
            [
                *self._inside(0),
                sys.executable,
                "-c",
                NODE_OF,
                self._places[number][1],
                f"{self.head}:{GCS_PORT}",
            ],
            env=self.env,
            check=True,
            capture_output=True,
            text=True,
        )
        subprocess.run(
            [
                *self._inside(number),
                "ray",
                "drain-node",
                f"--address={self.head}:{GCS_PORT}",
                f"--node-id={node_id.stdout.split()[-1]}",
                "--reason=DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message=a test",
                f"--deadline-remaining-seconds={seconds:.0f}",
            ],
            env=self.env,
            check=True,
            capture_output=True,
        )

    def _inside(self, number: int) -> list[str]:
        return ["ip", "netns", "exec", self._places[number][0]]

    def processes(self, number: int) -> list[int]:
        """Return the process ids of a machine."""
        found = subprocess.run(
            ["ip", "netns", "pids", self._places[number][0]],
            check=True,
            capture_output=True,
            text=True,
        )
        return [int(pid) for pid in found.stdout.split()]

    def describe_processes(self, number: int) -> str:
        """Return the command lines of a machine's processes, for error messages."""
        found = (Path(f"/proc/{pid}/cmdline") for pid in self.processes(number))
        return "\n".join(
            path.read_text().replace("\0", " ")[:150] for path in found if path.exists()
        )

    def kill(self, number: int) -> None:
        """Switch a machine off: kill every process on it."""
        while found := self.processes(number):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def cut_link(self, number: int) -> None:
        """Take a machine's link down."""
        namespaces.cut_link(self._places[number][0])

    def restore_link(self, number: int) -> None:
        """Bring a machine's link up again."""
        namespaces.restore_link(self._places[number][0])

    def submit(self, config: Path, out: Path) -> RunningCommand:
        """Submit a run from the laptop and follow it."""
        return self.laptop.start(
            "submit", str(config), "--shared", str(config.parent), cwd=config.parent, out=out
        )


NODE_OF = """
import sys
from ray._raylet import GcsClient
found = GcsClient(address=sys.argv[2]).get_all_node_info()
print(next(node.node_id.hex() for node in found.values() if node.node_manager_address == sys.argv[1] and node.state == 0))
"""


@contextlib.contextmanager
def machines(size: int) -> Iterator[Machines]:
    """Yield `size` machines on which nothing runs yet; switch them off afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="dft-"))  # a short path, because Ray's sockets are in it
    with namespaces.star(size) as places:
        created = Machines(places, folder)
        try:
            yield created
        finally:
            for number in range(size):
                created.kill(number)
            shutil.rmtree(folder, ignore_errors=True)
