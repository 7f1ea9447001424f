"""Faults 7 to 11 on three machines (network namespaces): a head, and two that train, joined by
gloo.

The run is submitted from a fourth machine with a token and stores everything in a bucket there, so
a machine whose link is cut reaches neither its peer nor the bucket. Times are printed.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import history
import namespaces
import pytest
import ranks
import s3
import tiny
import yaml
from job_cluster import RunningCommand
from machines import Machines, machines

from dist_ft.checkpoint import manifest as manifests
from dist_ft.storage.filesystem import Store

pytest.importorskip("aiohttp_cors", reason="needs ray[default] (the extra `cluster`)")
pytest.importorskip("moto.server", reason="needs moto[server] (the extra `dev`)")
pytest.importorskip("s3fs", reason="needs s3fs (the extra `s3`)")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900), *namespaces.MARKS]
SHARP = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
}
"""How soon Ray considers a machine lost, and how soon machines without a head end (default: a
minute)."""
NOTICE_S = 20


class Run:
    """A run in the bucket, as seen from outside."""

    def __init__(self, name: str, command: RunningCommand) -> None:
        self.store, self.command = Store(f"s3://{s3.BUCKET}/runs/{name}"), command

    def world_sizes(self) -> list[int]:
        return [
            json.loads(self.store.read(f"attempts/{name}"))["world_size"]
            for name in self.store.list("attempts")
            if name.endswith(".json")
        ]

    def checkpoint_attempts(self) -> dict[int, int]:
        """Return {step: attempt} of all checkpoints."""
        names = [
            path.split("/")[1]
            for path in self.store.walk()
            if re.fullmatch(r"checkpoints/[^/]+/manifest.json", path)
        ]
        return dict(filter(None, map(manifests.parse_folder, names)))

    def shown_step(self) -> int:
        """Return the latest step shown on the terminal."""
        return max(map(int, re.findall(r"step +(\d+)/", self.command.stdout)), default=0)

    def latest_step(self) -> int:
        return max(self.checkpoint_attempts(), default=0)

    def wait_for(
        self,
        condition: Callable[[], bool],
        timeout_s: float = 180,
        details: Callable[[], str] = str,
    ) -> float:
        """Wait until `condition()`; return the seconds it took. `details`: added to the error
        message."""
        started_at = time.monotonic()
        while not condition():
            has_failed = (
                self.command.process.poll() is not None or time.monotonic() - started_at > timeout_s
            )
            assert not has_failed, (
                self.command.stdout[-3000:] + self.command.stderr[-2000:] + details()
            )
            time.sleep(0.2)
        return time.monotonic() - started_at


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("machines"))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    """Three running machines, and a bucket outside them."""
    with machines(3) as created, s3.server(namespaces.HOST) as port:
        bucket = {**s3.CREDENTIALS, "AWS_ENDPOINT_URL": f"http://{namespaces.HOST}:{port}"}
        for name, value in bucket.items():
            monkeypatch.setenv(name, value)
        s3.reset_options({})
        created.env |= {**SHARP, **bucket}
        for number in range(3):
            created.start(number)
        yield created
    s3.reset_options({})


def submit(cluster: Machines, base: Path, name: str, **checkpoint: Any) -> Run:
    document = config(
        base,
        name,
        10**6,
        workers=[1, 2],
        network_interface=namespaces.LINK,
        resize_interval_s=10,
        **checkpoint,
    )
    document["run"]["storage"] = f"s3://{s3.BUCKET}/runs"
    (base / f"{name}.yaml").write_text(yaml.safe_dump(document))
    return submit_again(cluster, base, name)


def submit_again(cluster: Machines, base: Path, name: str) -> Run:
    number = sum(1 for _ in base.glob(f"{name}-*.out"))
    return Run(name, cluster.submit(base / f"{name}.yaml", base / f"{name}-{number}.out"))


def config(
    base: Path, name: str, steps: int, every_steps: int = 10, **cluster: Any
) -> dict[str, Any]:
    return tiny.config(
        base,
        name,
        workers=2,
        schedule={"epochs": None, "steps": steps, "name": "constant"},
        checkpoint={"every_steps": every_steps, "keep_last": 10**6},
        optimizer={"learning_rate": 1e-4},
        cluster={"cpus_per_worker": 1, "standby": False, **cluster},
    )


def finish(cluster: Machines, base: Path, run: Run, job: str, every_steps: int = 10) -> None:
    """Stop the run as a person would, and compare it with an undisturbed one."""
    code, output = cluster.laptop.run("jobs", "stop", job, cwd=base)
    assert code == 0 and f"{job}: STOPPED" in output, output
    assert run.command.process.wait(90) == 130
    name = run.store.url.rpartition("/")[2]
    fixed = config(base, f"{name}-fixed", run.latest_step(), every_steps)
    ranks.require_ok(
        ranks.run_ranks(2, [fixed], base / f"{name}-ranks", timeout_s=400), base / f"{name}-ranks"
    )
    other = base / f"runs/{name}-fixed"
    assert history.losses(run.store.url) == pytest.approx(history.losses(other), abs=1e-5)
    assert sorted(map(tuple, history.ledger(run.store.url).tolist())) == sorted(
        map(tuple, history.ledger(other).tolist())
    )


def test_fault_8_10_11_cut_link_and_its_return(cluster: Machines, base: Path) -> None:
    run = submit(cluster, base, "cut")
    print(f"\nsubmitted to 2 workers: {run.wait_for(lambda: run.world_sizes() == [2]):.1f} s")
    run.wait_for(lambda: run.latest_step() >= 20)
    cluster.cut_link(2)
    seen = run.checkpoint_attempts()
    print(
        "link cut to an attempt with 1 worker: "
        f"{run.wait_for(lambda: run.world_sizes()[-1:] == [1]):.1f} s"
    )
    print(
        "... to its first checkpoint: "
        f"{run.wait_for(lambda: run.checkpoint_attempts().get(run.latest_step()) == 2):.1f} s more"
    )
    assert len(cluster.processes(2)) > 3, "the cut-off machine still runs"
    cluster.restore_link(2)
    seconds = run.wait_for(
        lambda: not cluster.processes(2), details=lambda: cluster.describe_processes(2)
    )
    print(f"link back to the end of every process that was cut off: {seconds:.1f} s")
    late = {step for step, attempt in run.checkpoint_attempts().items() if attempt == 1} - set(seen)
    first = min(step for step, attempt in run.checkpoint_attempts().items() if attempt == 2)
    assert all(step < first for step in late), (
        "no checkpoint of the cut-off side counts after the newer attempt started"
    )
    cluster.start(2)
    print(
        "machine started again to an attempt with 2 workers: "
        f"{run.wait_for(lambda: run.world_sizes()[-1:] == [2]):.1f} s"
    )
    saved = run.latest_step()
    run.wait_for(lambda: run.latest_step() >= saved + 20)
    assert run.world_sizes() == [2, 1, 2]
    finish(cluster, base, run, "cut")


def test_fault_7_machine_is_drained_with_a_deadline(cluster: Machines, base: Path) -> None:
    never = 10**6
    run = submit(cluster, base, "drained", every_steps=never)
    run.wait_for(lambda: run.shown_step() >= 20)
    assert run.world_sizes() == [2] and run.latest_step() == 0, "nothing is saved"
    notice_step, at = run.shown_step(), time.monotonic()
    cluster.drain(2, NOTICE_S)
    print(
        f"\nnotice at step {notice_step} to a checkpoint: "
        f"{run.wait_for(lambda: run.latest_step() >= notice_step, NOTICE_S):.1f} s"
    )
    time.sleep(max(0.0, at + NOTICE_S - time.monotonic()))
    saved = run.latest_step()
    cluster.kill(2)
    print(
        "machine gone to an attempt with 1 worker: "
        f"{run.wait_for(lambda: run.world_sizes()[-1:] == [1]):.1f} s"
    )
    run.command.wait_for(f"resuming from step {saved}")
    cluster.start(2)
    print(
        "machine started again to an attempt with 2 workers: "
        f"{run.wait_for(lambda: run.world_sizes()[-1:] == [2]):.1f} s"
    )
    run.command.wait_for("workers is about to change")
    assert run.world_sizes() == [2, 1, 2] and run.latest_step() > saved
    finish(cluster, base, run, "drained", never)


def test_fault_9_head_is_killed_and_the_same_command_resumes(cluster: Machines, base: Path) -> None:
    run = submit(cluster, base, "headless")
    run.wait_for(lambda: run.latest_step() >= 20)
    cluster.kill(0)
    at, old = time.monotonic(), run.checkpoint_attempts()
    while cluster.processes(1) or cluster.processes(2):
        assert time.monotonic() - at < 120, cluster.describe_processes(
            1
        ) + cluster.describe_processes(2)
        time.sleep(0.2)
    print(
        f"\nhead killed to the end of every process of the other two: {time.monotonic() - at:.1f} s"
    )
    late, at = run.checkpoint_attempts(), time.monotonic()
    assert max(late) >= max(old)
    for number in range(3):
        cluster.start(number)
    started = time.monotonic()
    assert run.command.process.wait(120) == 1 and "Traceback" not in run.command.stderr
    assert (
        "If the cluster's head was restarted, the same command submits the run again"
        in run.command.stderr
    )
    run = submit_again(cluster, base, "headless")
    run.command.wait_for(f"resuming from step {max(late)}")
    run.wait_for(lambda: run.latest_step() > max(late))
    print(
        f"three machines started: {started - at:.1f} s; the same command to its first checkpoint: "
        f"{time.monotonic() - started:.1f} s"
    )
    assert run.world_sizes() == [2, 2]
    finish(cluster, base, run, "headless")
