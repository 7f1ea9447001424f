"""The example of the docs, started as the docs say: what it answers over HTTP is what predict says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ports
import pytest
import tiny_tasks

from dist_ft import api
from dist_ft.config.load import load_config
from dist_ft.inference.predict import Predictor
from dist_ft.runtime import local

pytestmark = [pytest.mark.slow, pytest.mark.ray]
ROOT = Path(__file__).resolve().parents[2]
START = """
import sys, time, ray
from ray import serve
ray.init(address="local", include_dashboard=False, num_cpus=2, object_store_memory=128 * 2**20)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
from docs.examples.serve import app
serve.run(app)
print("ready", flush=True)
time.sleep(3600)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Return the URL of the example and the folder of its model."""
    for module in ("fastapi", "grpc_reflection"):
        pytest.importorskip(module, reason="Ray Serve needs the extra serve")
    base = tiny_tasks.base(tmp_path_factory.mktemp("serve"))
    config = load_config(
        tiny_tasks.config(base, "sequence_classification", "served", schedule={"epochs": 2})
    )
    local.run(config)
    api.export(config, str(base / "out"))
    port = ports.find_free_port()
    with open(base / "stderr", "w") as stderr_file:
        process = subprocess.Popen(
            [sys.executable, "-c", START, str(port)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stderr_file,
            text=True,
            start_new_session=True,
            env={
                **os.environ,
                "MODEL": str(base / "out"),
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
            },
        )
    try:
        assert process.stdout is not None
        assert any(line.strip() == "ready" for line in process.stdout), (
            base / "stderr"
        ).read_text()[-3000:]
        yield f"http://127.0.0.1:{port}/", str(base / "out")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def post(url: str, rows: Any) -> tuple[int, Any]:
    request = urllib.request.Request(
        url, json.dumps(rows).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_answers_equal_predictions(served: tuple[str, str]) -> None:
    url, model = served
    rows = [
        {"text": "the quick tea tea"},
        {"text": "owls owls owls"},
        {"text": "rivers and rivers"},
    ]
    started = time.monotonic()
    status, said = post(url, rows)
    assert status == 200 and time.monotonic() - started < 60
    for one, other in zip(said, Predictor(model).predict(rows), strict=True):
        assert one["label"] == other["label"] and one["score"] == pytest.approx(
            other["score"], abs=1e-5
        )


def test_a_bad_request_gets_one_line(served: tuple[str, str]) -> None:
    url, _ = served
    status, said = post(url, [{"words": "x"}])
    assert status == 400 and said["error"].startswith("a row has no text in 'text' (it has words)")
    status, said = post(url, {"text": "x"})
    assert status == 400 and "must be a JSON list of rows" in said["error"]


def test_bad_rows_fail_their_own_request_only(served: tuple[str, str]) -> None:
    url, model = served
    good = {"text": "the quick tea tea"}
    [expected] = Predictor(model).predict([good])
    bad = [{"text": "half \ud800"}, {"text": 5}, {"text": None}, {"text": ["x"]}, {"words": "x"}]
    requests = [[good], *([row] for row in bad), [good, good], [good, bad[0]]]
    # at once, so that they share batches
    with ThreadPoolExecutor(len(requests)) as pool:
        for _ in range(3):
            answers = list(pool.map(lambda rows: post(url, rows), requests))
            assert [status for status, _ in answers] == [200, *(400 for _ in bad), 200, 400]
            for status, said in answers:
                if status == 200:
                    assert all(one["label"] == expected["label"] for one in said)
                else:
                    assert "\n" not in said["error"] and "Traceback" not in said["error"]
