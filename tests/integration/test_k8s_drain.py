"""The preStop hook of worker pods, as rendered, on a real Ray node with token authentication.

The node has process ids of its own, as a pod has. The hook must announce the node's end to Ray, hold the pod while a worker
runs on it and no longer, and not hold it where none does.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ports
import pytest

from dist_ft.cluster.k8s.pods import drain_lifecycle

NOTICE_S = 90
INSIDE = '''
import glob, json, re, subprocess, sys, time
import ray
from ray._raylet import GcsClient

hook, address, notice_s = json.loads(sys.argv[1]), sys.argv[2], float(sys.argv[3])

@ray.remote(num_cpus=1)
class Worker:
    def ready(self): return True

def titles():
    """Return how Ray names its processes that run here."""
    found = set()
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            found |= set(re.findall("ray::[A-Za-z_]+", open(path, errors="replace").read()))
        except OSError:
            pass  # it has just ended
    return sorted(found)

ray.init(address=address, logging_level="ERROR", log_to_driver=False)
found = {}
worker = Worker.remote()
ray.get(worker.ready.remote())
me, gcs = ray.get_runtime_context().get_node_id(), GcsClient(address=address)
started, now = time.monotonic(), time.time()
running = subprocess.Popen(hook, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
while not gcs.get_draining_nodes() and time.monotonic() < started + 30:
    time.sleep(0.2)
found["announced_s"] = time.monotonic() - started
found["deadline_s"] = {node if isinstance(node, str) else node.hex(): at / 1000 - now
                       for node, at in gcs.get_draining_nodes().items()}.get(me)
time.sleep(2)
found["held"] = running.poll() is None
ray.kill(worker)
while "ray::Worker" in titles() and running.poll() is None:  # on a busy machine Ray takes seconds to end it
    time.sleep(0.1)
gone, found["left"] = time.monotonic(), titles()
found["said"] = running.communicate(timeout=60)[0]
found["released_s"] = time.monotonic() - gone
started = time.monotonic()
subprocess.run(hook, timeout=60, check=False, capture_output=True)
found["idle_s"] = time.monotonic() - started
print("FOUND " + json.dumps(found))
'''


@pytest.mark.ray
@pytest.mark.root
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="needs root and unshare (process ids)",
)
def test_the_prestop_hook_drains_the_node_and_holds_the_pod(tmp_path: Path) -> None:
    port, short = (
        ports.find_free_port(),
        tempfile.mkdtemp(prefix="df", dir="/tmp"),
    )  # a path of Ray's sockets may have 107 characters
    hook = drain_lifecycle(NOTICE_S)["preStop"]["exec"]["command"]
    script = tmp_path / "inside.py"
    script.write_text(INSIDE)
    start = (
        f"ray start --head --node-ip-address 127.0.0.1 --port {port} --num-cpus 1 --include-dashboard=false "
        f"--object-store-memory 80000000 --disable-usage-stats --temp-dir {short} >{tmp_path}/start.log 2>&1"
    )
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = f'{start} && exec {sys.executable} "$@"'
    done = subprocess.run(
        [
            "unshare",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "bash",
            "-c",
            command,
            "bash",
            str(script),
            json.dumps(hook),
            f"127.0.0.1:{port}",
            str(NOTICE_S),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    shutil.rmtree(short, ignore_errors=True)
    if "unshare failed" in done.stderr:
        pytest.skip(f"needs a PID namespace, which cannot be created here ({done.stderr.strip()})")
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    assert line, f"{done.stdout}\n{done.stderr}\n{(tmp_path / 'start.log').read_text()}"
    found = json.loads(line.removeprefix("FOUND "))
    print(found)
    assert found["deadline_s"] is not None, f"Ray was not notified: {found}"
    assert NOTICE_S - 5 < found["deadline_s"] < NOTICE_S + 30, (
        "the deadline Ray knows; the command takes seconds to start"
    )
    assert found["held"], "the pod is held while a worker runs"
    assert found["released_s"] < 10, f"and not for longer: {found['left']}"
    assert found["idle_s"] < 3, "nor where nothing runs: at the end of a job no pod waits"
