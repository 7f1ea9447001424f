"""Predictions by workers on Ray are those of one process, byte for byte, also where the first start was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_tasks

from dist_ft import api
from dist_ft.config.load import load_config
from dist_ft.inference import prediction_shards
from dist_ft.runtime import local
from dist_ft.storage.filesystem import Store

pytestmark = [pytest.mark.slow, pytest.mark.ray]
SMALL = (
    "import dist_ft.inference.prediction_shards as p; p.split_input.__defaults__ = (2000,); "
    "from dist_ft import predict; import sys; "
    "print(predict(sys.argv[1], sys.argv[2], sys.argv[3], workers=int(sys.argv[4])))"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    base = tiny_tasks.base(tmp_path_factory.mktemp("model"))
    config = load_config(
        tiny_tasks.config(base, "token_classification", "said", schedule={"epochs": 1})
    )
    local.run(config)
    api.export(config, str(base / "out"))
    return str(base / "out")


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SMALL, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def shards(folder: Path) -> dict[str, bytes]:
    store = Store(str(folder))
    return {name: store.read(name) for name in store.list() if name.startswith("part-")}


def test_workers_write_the_same_as_one_process_and_a_killed_run_resumes(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_tasks.make_data(tmp_path / "in", "token_classification", 1500, seed=4)
    alone = start(model, source, str(tmp_path / "alone"), "0")
    assert alone.wait(300) == 0, alone.communicate()[1]
    expected = shards(tmp_path / "alone")
    assert len(expected) > 40
    rows = [
        json.loads(line)["tokens"]
        for name in sorted(expected)
        for line in expected[name].splitlines()
    ]
    assert rows == [
        json.loads(line)["tokens"]
        for shard in sorted((tmp_path / "in").glob("*.jsonl"))
        for line in shard.read_text().splitlines()
    ]

    killed = start(model, source, str(tmp_path / "many"), "2")
    end = time.monotonic() + 240
    while len(shards(tmp_path / "many")) < 3:
        assert killed.poll() is None and time.monotonic() < end, killed.communicate()[1]
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(60)
    time.sleep(5)  # what Ray started ends with its driver
    found = shards(tmp_path / "many")
    assert 3 <= len(found) < len(expected), "killed midway"
    assert all(found[name] == expected[name] for name in found), (
        "a shard exists whole or not at all"
    )

    again = start(model, source, str(tmp_path / "many"), "2")
    out, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert int(out.split("rows=")[1].rstrip(")\n")) == 1500 - sum(
        one.count(b"\n") for one in found.values()
    )
    assert shards(tmp_path / "many") == expected
    assert prediction_shards.INFO_FILE in os.listdir(tmp_path / "many")


def test_bad_row_is_one_line_on_a_worker_too(model: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"tokens": ["tea"]}) + "\n" + json.dumps({"text": " "}) + "\n"
    )
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "dist_ft.cli",
            "predict",
            model,
            str(tmp_path / "in.jsonl"),
            "--out",
            str(tmp_path / "said"),
            "--workers",
            "1",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode != 0
    assert (
        "dist-ft: a row has no text in 'text'" in ended.stderr and "Traceback" not in ended.stderr
    )
