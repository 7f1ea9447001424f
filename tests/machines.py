"""Machines of their own: network namespaces in which `ray start` runs, as on rented nodes, with token authentication.

The first is the head and has no CPU to give. The test's own side is the laptop: it submits, watches, and holds the bucket.
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
from job_cluster import ROOT, Cluster, Watched

GCS_PORT, JOB_PORT, AGENT_PORT = 6379, 8265, 52365


class Machines:
    """What a test does to them. Numbers: 0 is the head, 1 and more are nodes with one CPU. `env`: what each of them has."""

    def __init__(self, places: list[tuple[str, str]], folder: Path) -> None:
        self._places, self._folder = places, folder
        (folder / "token").write_text(secrets.token_hex(32))
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("RAY_", "GLOO_", "AWS_"))
        }
        self.env = {
            **kept,
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
        """The cluster as it is seen from the test's own side."""
        url = f"http://{self.head}:{JOB_PORT}"
        return Cluster(url, self._folder, {**self.env, "RAY_API_SERVER_ADDRESS": url})

    def start(self, number: int, timeout_s: float = 120) -> None:
        """Start Ray on a machine, and wait until the cluster has it."""
        address = self._places[number][1]
        own = Path(
            tempfile.mkdtemp(prefix=f"{number}-", dir=self._folder)
        )  # as a machine's /tmp, empty after a start
        head = [
            "--num-cpus=0",
            "--head",
            f"--port={GCS_PORT}",
            f"--dashboard-host={address}",
            f"--dashboard-port={JOB_PORT}",
        ]
        join = ["--num-cpus=1", f"--address={self.head}:{GCS_PORT}"]
        with open(own / "said", "w") as said:
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
                stdout=said,
                stderr=said,
            )
        until = time.monotonic() + timeout_s
        while "Ray runtime started" not in (told := (own / "said").read_text()):
            assert process.poll() is None and time.monotonic() < until, told[-3000:]
            time.sleep(0.2)

    def drain(self, number: int, seconds: float) -> None:
        """Say on a machine that it will be taken away, as the hook of a pod does."""
        own = subprocess.run(
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
                f"--node-id={own.stdout.split()[-1]}",
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
        """Return the processes of a machine."""
        found = subprocess.run(
            ["ip", "netns", "pids", self._places[number][0]],
            check=True,
            capture_output=True,
            text=True,
        )
        return [int(pid) for pid in found.stdout.split()]

    def running(self, number: int) -> str:
        """Return what runs on a machine, for people."""
        found = (Path(f"/proc/{pid}/cmdline") for pid in self.processes(number))
        return "\n".join(
            path.read_text().replace("\0", " ")[:150] for path in found if path.exists()
        )

    def kill(self, number: int) -> None:
        """Switch a machine off: every process there ends, with no good-bye."""
        while found := self.processes(number):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def cut(self, number: int) -> None:
        """Take its link away."""
        namespaces.cut(self._places[number][0])

    def join(self, number: int) -> None:
        """Bring it back."""
        namespaces.join(self._places[number][0])

    def submit(self, config: Path, out: Path) -> Watched:
        """Submit a run from the laptop and watch it."""
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
    """Yield so many, with nothing running on them yet; switch off what runs there afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="dft-"))  # a short path: Ray's sockets lie below it
    with namespaces.star(size) as places:
        there = Machines(places, folder)
        try:
            yield there
        finally:
            for number in range(size):
                there.kill(number)
            shutil.rmtree(folder, ignore_errors=True)
