"""`dist-ft drill` as a person gives it: what it says, what it leaves behind, and that it can fail."""

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


def found(base: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((base / "found.json").read_text())
    return {finding["name"]: finding for finding in report["findings"]}


def test_a_drill_of_one_process_without_a_config_holds_and_leaves_nothing(tmp_path: Path) -> None:
    code, output = drill(
        tmp_path,
        "--scenario",
        "death",
        "--scenario",
        "storage",
        "--json",
        "found.json",
        f"data.cache_dir={tmp_path}/cache",
    )
    assert code == 0, output[-3000:]
    assert (
        "drill on one process" in output
        and "first new step after" in output
        and "Traceback" not in output
    )
    seen = found(tmp_path)
    assert list(seen) == ["reference", "death", "storage"] and not any(
        finding["problems"] for finding in seen.values()
    )
    assert 0 < seen["death"]["times"]["back_s"] < 120 and seen["death"]["seen"].endswith(
        "2 attempts"
    )
    assert seen["storage"]["seen"].endswith("1 attempt")
    assert list((tmp_path / "runs").iterdir()) == [], "its folder is removed"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    ("scenario", "measured"),
    [
        ("death", {"back_s"}),
        ("hang", {"noticed_s", "back_s"}),
        ("preemption", {"left_s", "back_s"}),
        ("storage", set()),
    ],
)
def test_a_drill_on_two_ray_workers_holds(
    tmp_path: Path, scenario: str, measured: set[str]
) -> None:
    code, output = drill(
        tmp_path,
        "cluster.workers=2",
        "cluster.cpus_per_worker=0.5",
        "--json",
        "found.json",
        "--scenario",
        scenario,
    )
    print(output)
    assert code == 0, output[-3000:]
    seen = found(tmp_path)
    assert list(seen) == ["reference", scenario] and not any(
        finding["problems"] for finding in seen.values()
    )
    assert "24 steps, losses equal to the last bit" in seen[scenario]["seen"]
    took = {name: seconds for name, seconds in seen[scenario]["times"].items() if name != "stall_s"}
    assert set(took) == measured and all(0 < seconds < 120 for seconds in took.values())
    if scenario == "hang":
        assert 14 <= took["noticed_s"] <= took["back_s"]
