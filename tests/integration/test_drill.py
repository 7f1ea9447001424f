"""`dist-ft drill` as a person runs it: its output, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def drill(base: Path, *arguments: str, timeout_s: float = 500) -> tuple[int, str]:
    """Return exit code and output of a drill in the folder `base`."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "dist_ft.cli", "drill", *arguments],
        capture_output=True,
        text=True,
        cwd=base,
        timeout=timeout_s,
        env={**environment, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    return done.returncode, done.stdout + done.stderr


def read_findings(base: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((base / "report.json").read_text())
    return {finding["name"]: finding for finding in report["findings"]}


def test_drill_of_one_process_passes_and_leaves_nothing(tmp_path: Path) -> None:
    code, output = drill(
        tmp_path,
        "--scenario",
        "death",
        "--scenario",
        "storage",
        "--json",
        "report.json",
        f"data.cache_dir={tmp_path}/cache",
    )
    assert code == 0, output[-3000:]
    assert (
        "drill on one process" in output
        and "first new step after" in output
        and "Traceback" not in output
    )
    findings = read_findings(tmp_path)
    assert list(findings) == ["reference", "death", "storage"] and not any(
        finding["problems"] for finding in findings.values()
    )
    assert 0 < findings["death"]["times"]["resumed_s"] < 120 and findings["death"][
        "result"
    ].endswith("2 attempts")
    assert findings["storage"]["result"].endswith("1 attempt")
    assert list((tmp_path / "runs").iterdir()) == [], "its folder was removed"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    ("scenario", "measured"),
    [
        ("death", {"resumed_s"}),
        ("hang", {"detected_s", "resumed_s"}),
        ("preemption", {"saved_s", "resumed_s"}),
        ("storage", set()),
    ],
)
def test_drill_on_two_ray_workers_passes(tmp_path: Path, scenario: str, measured: set[str]) -> None:
    code, output = drill(
        tmp_path,
        "cluster.workers=2",
        "cluster.cpus_per_worker=0.5",
        "--json",
        "report.json",
        "--scenario",
        scenario,
    )
    print(output)
    assert code == 0, output[-3000:]
    findings = read_findings(tmp_path)
    assert list(findings) == ["reference", scenario] and not any(
        finding["problems"] for finding in findings.values()
    )
    assert "24 steps, losses equal to the last bit" in findings[scenario]["result"]
    times = {
        name: seconds
        for name, seconds in findings[scenario]["times"].items()
        if name != "save_stall_s"
    }
    assert set(times) == measured and all(0 < seconds < 120 for seconds in times.values())
    if scenario == "hang":
        assert 14 <= times["detected_s"] <= times["resumed_s"]
