"""A Ray cluster with token authentication (launch/cluster.sh), and a TCP proxy that cuts
connections to it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ports

ROOT = Path(__file__).resolve().parent.parent


class RunningCommand:
    """A command that runs in the background."""

    def __init__(self, command: list[str], cwd: Path, out: Path, env: dict[str, str]) -> None:
        self._out, self._err = out, out.with_suffix(".err")
        with open(self._out, "w") as stdout, open(self._err, "w") as stderr:
            self.process = subprocess.Popen(command, cwd=cwd, env=env, stdout=stdout, stderr=stderr)

    @property
    def stdout(self) -> str:
        """Its standard output so far."""
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        """Its standard error so far."""
        return self._err.read_text()

    def wait_for(self, text: str, timeout_s: float = 200) -> None:
        """Wait until its output contains `text`."""
        until = time.monotonic() + timeout_s
        while text not in self.stdout + self.stderr:
            has_failed = self.process.poll() is not None or time.monotonic() > until
            assert not has_failed, (
                f"{self.process.poll()}; not in its output: {text!r}\n"
                f"{self.stdout[-3000:]}\n{self.stderr[-2000:]}"
            )
            time.sleep(0.1)


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        url: of its job server.
        folder: its token and logs.
        env: environment variables of a shell that has access.
    """

    url: str
    folder: Path
    env: dict[str, str]

    @property
    def token(self) -> str:
        return (self.folder / "token").read_text()

    def start(self, *arguments: str, cwd: Path, out: Path, **env: str) -> RunningCommand:
        """Start `dist-ft` as a person would; its output goes to files."""
        return RunningCommand(
            [sys.executable, "-m", "dist_ft.cli", *arguments], cwd, out, {**self.env, **env}
        )

    def run(self, *arguments: str, cwd: Path, **env: str) -> tuple[int, str]:
        """Return exit code and output."""
        # -P: as for the installed command, modules are not looked for in the current folder
        done = subprocess.run(
            [sys.executable, "-P", "-m", "dist_ft.cli", *arguments],
            cwd=cwd,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )
        return done.returncode, done.stdout


@contextlib.contextmanager
def cluster(cpus: int = 4, **env: str) -> Iterator[Cluster]:
    """Start a cluster whose nodes also have the variables `env`, and end it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="dft-"))  # a short path, because Ray's sockets are in it
    port = next(
        port
        for port in iter(ports.find_free_port, 0)
        if all(_is_free(port + more) for more in (1, 2))
    )
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = {
        **inherited,
        "DIST_FT_CLUSTER": str(folder),
        "DIST_FT_CLUSTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DIST_FT_CLUSTER_CPUS": str(cpus),
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
    }
    script = str(ROOT / "launch/cluster.sh")
    done = subprocess.run(
        [script, "start"], env={**environment, **env}, capture_output=True, text=True, timeout=240
    )
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        url = f"http://127.0.0.1:{port}"
        yield Cluster(
            url,
            folder,
            {
                **environment,
                "RAY_AUTH_MODE": "token",
                "RAY_API_SERVER_ADDRESS": url,
                "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            },
        )
    finally:
        subprocess.run([script, "stop"], env=environment, capture_output=True, timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class CuttableProxy:
    """Forwards TCP connections to a port; `cut` breaks the open ones, and new ones are accepted
    again."""

    def __init__(self, port: int) -> None:
        self._to, self._open, self.num_cut = port, set[socket.socket](), 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                upstream = socket.create_connection(("127.0.0.1", self._to))
                self._open |= {client, upstream}
                for source, sink in ((client, upstream), (upstream, client)):
                    threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            self._open.discard(end)
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break every open connection."""
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
                self.num_cut += 1

    def close(self) -> None:
        """Stop accepting connections, and break the open ones."""
        self._listening.close()
        self.cut()
