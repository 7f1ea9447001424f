"""A Ray cluster with token authentication, started by launch/cluster.sh, and a TCP proxy before it that cuts connections."""

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


class Watched:
    """A command that runs: `said` is its stdout so far, `noted` its stderr."""

    def __init__(self, command: list[str], cwd: Path, out: Path, env: dict[str, str]) -> None:
        self._out, self._err = out, out.with_suffix(".err")
        with open(self._out, "w") as stdout, open(self._err, "w") as stderr:
            self.process = subprocess.Popen(command, cwd=cwd, env=env, stdout=stdout, stderr=stderr)

    @property
    def said(self) -> str:
        return self._out.read_text()

    @property
    def noted(self) -> str:
        return self._err.read_text()

    def wait_for(self, text: str, timeout_s: float = 200) -> None:
        """Wait until it has said or noted `text`."""
        until = time.monotonic() + timeout_s
        while text not in self.said + self.noted:
            over = self.process.poll() is not None or time.monotonic() > until
            assert not over, (
                f"{self.process.poll()}; not said: {text!r}\n{self.said[-3000:]}\n{self.noted[-2000:]}"
            )
            time.sleep(0.1)


@dataclass(frozen=True)
class Cluster:
    """One that runs. `env`: what a shell that may ask it has; `folder`: its token and logs."""

    url: str
    folder: Path
    env: dict[str, str]

    @property
    def token(self) -> str:
        return (self.folder / "token").read_text()

    def start(self, *arguments: str, cwd: Path, out: Path, **env: str) -> Watched:
        """Start `dist-ft` as a person would; what it says goes to files."""
        return Watched(
            [sys.executable, "-m", "dist_ft.cli", *arguments], cwd, out, {**self.env, **env}
        )

    def run(self, *arguments: str, cwd: Path, **env: str) -> tuple[int, str]:
        """Return exit code and output."""
        done = subprocess.run(
            [sys.executable, "-m", "dist_ft.cli", *arguments],
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
    """Start one, whose nodes have `env` besides, and end it."""
    folder = Path(tempfile.mkdtemp(prefix="dft-"))  # a short path: Ray's sockets lie in it
    port = next(
        port for port in iter(ports.free, 0) if all(_is_free(port + more) for more in (1, 2))
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = {
        **kept,
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


class Cutter:
    """Passes TCP connections on to a port; `cut` breaks all there are, and new ones are accepted again."""

    def __init__(self, port: int) -> None:
        self._to, self._open, self.num_cut = port, set[socket.socket](), 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listening.accept()
                there = socket.create_connection(("127.0.0.1", self._to))
                self._open |= {here, there}
                for source, sink in ((here, there), (there, here)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            self._open.discard(end)
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break every connection there is."""
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
                self.num_cut += 1

    def close(self) -> None:
        """Take no more."""
        self._listening.close()
        self.cut()
