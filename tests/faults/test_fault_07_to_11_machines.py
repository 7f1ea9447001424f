"""Faults 7 to 11 on three machines of their own (network namespaces): a head and two that train, joined by gloo.

The run is submitted from a fourth place with a token and keeps everything in a bucket there, so a machine whose link is cut
reaches neither its peer nor the bucket. Times are printed.
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
from job_cluster import Watched
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
"""How soon Ray takes a machine for lost, and how soon machines without a head end (by default after a minute)."""
NOTICE_S = 20


class Run:
    """A run in the bucket, as it can be seen from outside."""

    def __init__(self, name: str, watched: Watched) -> None:
        self.store, self.watched = Store(f"s3://{s3.BUCKET}/runs/{name}"), watched

    def worlds(self) -> list[int]:
        return [
            json.loads(self.store.read(f"attempts/{name}"))["world_size"]
            for name in self.store.list("attempts")
            if name.endswith(".json")
        ]

    def commits(self) -> dict[int, int]:
        """Return the attempt of every committed step."""
        names = [
            path.split("/")[1]
            for path in self.store.walk()
            if re.fullmatch(r"checkpoints/[^/]+/manifest.json", path)
        ]
        return dict(filter(None, map(manifests.parse_folder, names)))

    def shown(self) -> int:
        """Return the newest step the watcher was shown."""
        return max(map(int, re.findall(r"step +(\d+)/", self.watched.said)), default=0)

    def step(self) -> int:
        return max(self.commits(), default=0)

    def wait_for(
        self, what: Callable[[], bool], timeout_s: float = 180, why: Callable[[], str] = str
    ) -> float:
        """Wait while the job is watched; return the seconds it took. `why`: what is said where it takes too long."""
        begun = time.monotonic()
        while not what():
            over = self.watched.process.poll() is not None or time.monotonic() - begun > timeout_s
            assert not over, self.watched.said[-3000:] + self.watched.noted[-2000:] + why()
            time.sleep(0.2)
        return time.monotonic() - begun


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("machines"))


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    """Three machines that run, and the bucket beside them."""
    with machines(3) as found, s3.server(namespaces.HOST) as port:
        bucket = {**s3.CREDENTIALS, "AWS_ENDPOINT_URL": f"http://{namespaces.HOST}:{port}"}
        for name, value in bucket.items():
            monkeypatch.setenv(name, value)
        s3.forget({})
        found.env |= {**SHARP, **bucket}
        for number in range(3):
            found.start(number)
        yield found
    s3.forget({})


def submit(there: Machines, base: Path, name: str, **checkpoint: Any) -> Run:
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
    return again(there, base, name)


def again(there: Machines, base: Path, name: str) -> Run:
    number = sum(1 for _ in base.glob(f"{name}-*.out"))
    return Run(name, there.submit(base / f"{name}.yaml", base / f"{name}-{number}.out"))


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


def finish(there: Machines, base: Path, run: Run, job: str, every_steps: int = 10) -> None:
    """Stop the run as a person would, and compare it with one that nothing happened to."""
    code, output = there.laptop.run("jobs", "stop", job, cwd=base)
    assert code == 0 and f"{job}: STOPPED" in output, output
    assert run.watched.process.wait(90) == 130
    name = run.store.url.rpartition("/")[2]
    fixed = config(base, f"{name}-fixed", run.step(), every_steps)
    ranks.require_ok(
        ranks.run_ranks(2, [fixed], base / f"{name}-ranks", timeout_s=400), base / f"{name}-ranks"
    )
    other = base / f"runs/{name}-fixed"
    assert history.losses(run.store.url) == pytest.approx(history.losses(other), abs=1e-5)
    assert sorted(map(tuple, history.ledger(run.store.url).tolist())) == sorted(
        map(tuple, history.ledger(other).tolist())
    )


def test_fault_8_10_11_a_cut_link_the_cut_off_side_and_its_return(
    there: Machines, base: Path
) -> None:
    run = submit(there, base, "cut")
    print(f"\nsubmitted to 2 workers: {run.wait_for(lambda: run.worlds() == [2]):.1f} s")
    run.wait_for(lambda: run.step() >= 20)
    there.cut(2)
    seen = run.commits()
    print(
        f"link cut to an attempt with 1 worker: {run.wait_for(lambda: run.worlds()[-1:] == [1]):.1f} s"
    )
    print(
        f"... to its first commit: {run.wait_for(lambda: run.commits().get(run.step()) == 2):.1f} s more"
    )
    assert len(there.processes(2)) > 3, "the cut-off machine is alive and knows of nothing"
    there.join(2)
    took = run.wait_for(lambda: not there.processes(2), why=lambda: there.running(2))
    print(f"link back to the end of every process that was cut off: {took:.1f} s")
    late = {step for step, attempt in run.commits().items() if attempt == 1} - set(seen)
    first = min(step for step, attempt in run.commits().items() if attempt == 2)
    assert all(step < first for step in late), (
        "nothing the cut-off side did counts after the newer attempt began"
    )
    there.start(2)
    print(
        f"machine started again to an attempt with 2 workers: {run.wait_for(lambda: run.worlds()[-1:] == [2]):.1f} s"
    )
    kept = run.step()
    run.wait_for(lambda: run.step() >= kept + 20)
    assert run.worlds() == [2, 1, 2]
    finish(there, base, run, "cut")


def test_fault_7_a_machine_drained_with_a_deadline(there: Machines, base: Path) -> None:
    never = 10**6
    run = submit(there, base, "drained", every_steps=never)
    run.wait_for(lambda: run.shown() >= 20)
    assert run.worlds() == [2] and run.step() == 0, "nothing is saved"
    noticed, at = run.shown(), time.monotonic()
    there.drain(2, NOTICE_S)
    print(
        f"\nnotice at step {noticed} to a commit: {run.wait_for(lambda: run.step() >= noticed, NOTICE_S):.1f} s"
    )
    time.sleep(max(0.0, at + NOTICE_S - time.monotonic()))
    kept = run.step()
    there.kill(2)
    print(
        f"machine gone to an attempt with 1 worker: {run.wait_for(lambda: run.worlds()[-1:] == [1]):.1f} s"
    )
    run.watched.wait_for(f"going on from step {kept}")
    there.start(2)
    print(
        f"machine started again to an attempt with 2 workers: {run.wait_for(lambda: run.worlds()[-1:] == [2]):.1f} s"
    )
    run.watched.wait_for("workers is about to change")
    assert run.worlds() == [2, 1, 2] and run.step() > kept
    finish(there, base, run, "drained", never)


def test_fault_9_the_head_killed_and_the_same_command(there: Machines, base: Path) -> None:
    run = submit(there, base, "headless")
    run.wait_for(lambda: run.step() >= 20)
    there.kill(0)
    at, old = time.monotonic(), run.commits()
    while there.processes(1) or there.processes(2):
        assert time.monotonic() - at < 120, there.running(1) + there.running(2)
        time.sleep(0.2)
    print(
        f"\nhead killed to the end of every process of the other two: {time.monotonic() - at:.1f} s"
    )
    late, at = run.commits(), time.monotonic()
    assert max(late) >= max(old)
    for number in range(3):
        there.start(number)
    started = time.monotonic()
    assert run.watched.process.wait(120) == 1 and "Traceback" not in run.watched.noted
    assert (
        "if the cluster's head was started anew, the same command submits the run again"
        in run.watched.noted
    )
    run = again(there, base, "headless")
    run.watched.wait_for(f"going on from step {max(late)}")
    run.wait_for(lambda: run.step() > max(late))
    print(
        f"three machines started: {started - at:.1f} s; the same command to its first commit: {time.monotonic() - started:.1f} s"
    )
    assert run.worlds() == [2, 2]
    finish(there, base, run, "headless")
