"""`dist-ft selftest` as a person gives it, on two real Ray workers: all that it runs, and the report to send back."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]


def test_a_selftest_on_two_workers_holds_and_its_report_names_no_machine(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "dist_ft.cli",
            "selftest",
            "cluster.cpus_per_worker=0.5",
            "--out",
            "report",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=1400,
        env={**environment, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0 and "Traceback" not in output, output[-3000:]
    report = json.loads((tmp_path / "report/selftest.json").read_text())
    assert report["held"] and report["workers"] == 2
    found = {one["name"]: one for one in report["findings"]}
    assert {name for name, one in found.items() if one["verdict"] == "held"} == {
        "zero-1",
        "zero-2",
        "zero-3",
        "all-reduce",
        "killed",
        "resized",
        "speed",
    }
    assert found["killed"]["figures"]["largest_difference"] == 0.0
    assert found["zero-3"]["figures"]["largest_difference"] < 1e-5
    assert found["speed"]["figures"]["tokens_per_s"] > 0
    text = (tmp_path / "report/selftest.md").read_text()
    assert "all held" in text
    for said in (text, json.dumps(report)):
        assert socket.gethostname() not in said and str(tmp_path) not in said
    assert list((tmp_path / "runs").iterdir()) == [], "its folder is removed"
