"""`dist-ft selftest` as a person runs it, on two real Ray workers: all checks, and the report."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]


def test_selftest_on_two_workers_passes_and_its_report_names_no_machine(tmp_path: Path) -> None:
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
    assert report["passed"] and report["num_workers"] == 2
    findings = {one["name"]: one for one in report["findings"]}
    assert {name for name, one in findings.items() if one["verdict"] == "passed"} == {
        "zero-1",
        "zero-2",
        "zero-3",
        "all-reduce",
        "killed",
        "resized",
        "speed",
    }
    assert findings["killed"]["figures"]["largest_difference"] == 0.0
    assert findings["zero-3"]["figures"]["largest_difference"] < 1e-5
    assert findings["speed"]["figures"]["tokens_per_s"] > 0
    text = (tmp_path / "report/selftest.md").read_text()
    assert "all checks passed" in text
    for content in (text, json.dumps(report)):
        assert socket.gethostname() not in content and str(tmp_path) not in content
    assert list((tmp_path / "runs").iterdir()) == [], "its folder was removed"
