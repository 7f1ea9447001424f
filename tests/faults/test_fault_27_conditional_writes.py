"""Fault 27 and finding 5: several starts of one run at the same moment, as processes of their own.

On local disk and on an S3 server with conditional writes exactly one of them ends well. On one that
ignores the condition all refuse, although `--skip-check` leaves out the probe of `check`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import history
import pytest
import s3
import tiny
import yaml
from proxy import FaultyProxy

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint.attempts import start_attempt
from dist_ft.core.errors import ConfigError
from dist_ft.storage.filesystem import Store

pytest.importorskip("s3fs", reason="needs s3fs (the extra `s3`)")
pytest.importorskip("moto.server", reason="needs moto[server] (the extra `dev`)")
STEPS = 16
TAKEN_OVER = re.compile(
    r"dist-ft: \S+: attempt \d must not commit, attempt \d has taken over the run; this process "
    r"ends"
)
REFUSED = "a file that exists could be created again, so two starts of a run could not be"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("starts"), samples=60)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3.server() as found:
        yield found


@pytest.fixture
def careless(port: int) -> Iterator[FaultyProxy]:
    """A server that stores whatever is sent, whether the file exists or not."""
    found = FaultyProxy(port)
    found.dropped_headers = ("if-none-match",)
    yield found
    found.close()


def document(base: Path, name: str, endpoint: str = "") -> dict[str, Any]:
    """Return a run whose steps take long enough for all starts to meet."""
    found = tiny.config(
        base,
        name,
        schedule={"epochs": None, "steps": STEPS},
        checkpoint={"every_steps": 2, "keep_last": 3},
    )
    if endpoint:
        found["run"]["storage"] = f"s3://{s3.BUCKET}/runs"
        found["storage"] = {"options": {"s3": {"endpoint_url": endpoint}}}
    return found


def start(config: Path, log: Path) -> subprocess.Popen[str]:
    """Start a run as a process of its own, without `check`."""
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "dist_ft.cli", "train", str(config), "--skip-check"],
            env={
                **os.environ,
                **s3.CREDENTIALS,
                "OMP_NUM_THREADS": "1",
                "DIST_FT_FAILPOINT": "train.step:*!sleep0.3",
            },
            stdout=output,
            stderr=output,
            text=True,
        )


def run_at_once(
    base: Path, folder: Path, count: int, content: dict[str, Any]
) -> list[tuple[int, str]]:
    """Start the same run `count` times; return the exit code and last line of each."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    logs = [folder / f"start-{number}.log" for number in range(count)]
    processes = [start(config, log) for log in logs]
    try:
        codes = [process.wait(240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        (code, log.read_text().strip().splitlines()[-1])
        for code, log in zip(codes, logs, strict=True)
    ]


def require_one_winner(ends: list[tuple[int, str]], store: Store) -> None:
    """Fail unless one start ended well, the others in one line, and the run is whole."""
    codes = sorted(code for code, _ in ends)
    assert codes == [0] + [1] * (len(ends) - 1), ends
    for code, line in ends:
        assert code == 0 or TAKEN_OVER.search(line), ends
    names = discovery.list_committed(store)
    assert names[0].startswith(f"step-{STEPS:09d}-a")
    assert len(history.losses(store.url)) == STEPS
    numbers = [
        json.loads(store.read(f"attempts/{name}"))["attempt"] for name in store.list("attempts")
    ]
    assert numbers == list(range(1, len(ends) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_exactly_one_of_several_starts_wins_on_local_disk(
    base: Path, tmp_path: Path, count: int
) -> None:
    content = document(base, f"disk-{count}")
    ends = run_at_once(base, tmp_path, count, content)
    require_one_winner(ends, Store(f"{content['run']['storage']}/disk-{count}"))


@pytest.fixture
def s3_options(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process reads the bucket without a proxy."""
    for name, value in s3.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    s3.reset_options({"s3": {"endpoint_url": f"http://127.0.0.1:{port}"}})
    yield
    s3.reset_options({})


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_exactly_one_of_several_starts_wins_on_s3(
    base: Path, tmp_path: Path, port: int, s3_options: None, count: int
) -> None:
    content = document(base, f"bucket-{count}", f"http://127.0.0.1:{port}")
    ends = run_at_once(base, tmp_path, count, content)
    require_one_winner(ends, Store(f"{content['run']['storage']}/bucket-{count}"))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_fault_27_all_starts_refuse_a_store_that_ignores_conditions(
    base: Path, tmp_path: Path, careless: FaultyProxy, s3_options: None, count: int
) -> None:
    content = document(base, f"careless-{count}", careless.url)
    ends = run_at_once(base, tmp_path, count, content)
    assert [code for code, _ in ends] == [2] * count, ends
    for _, line in ends:
        assert f"run.storage: {REFUSED}" in line
    store = Store(f"{content['run']['storage']}/careless-{count}")
    for folder in ("checkpoints", "ledger", "attempts", "time"):
        assert store.list(folder) == []
    assert not store.exists("run.yaml")


def test_fault_27_the_probe_finds_a_server_that_ignores_conditions(
    port: int, careless: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: the same server is accepted without the proxy, and refused behind it."""
    for name, value in s3.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    store = Store(f"s3://{s3.BUCKET}/probe-{time.time_ns()}")
    try:
        s3.reset_options({"s3": {"endpoint_url": f"http://127.0.0.1:{port}"}})
        assert start_attempt(store, 1) == 1

        s3.reset_options({"s3": {"endpoint_url": careless.url}})
        with pytest.raises(ConfigError, match=REFUSED):
            start_attempt(store, 1)
        assert store.list("attempts") == ["000001.json"]
    finally:
        s3.reset_options({})
