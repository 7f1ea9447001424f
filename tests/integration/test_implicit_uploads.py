"""A driver that `uv run` started sends nothing of its folder to the cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
PLANTED = "pl4nted-folder-17c2"
CODE = """
import os, sys
from pathlib import Path
{before}
from dist_ft.inference.ray_data import _connected
with _connected(1) as ray:
    @ray.remote(num_cpus=0)
    def working_folder():
        return os.getcwd()
    print("folder", ray.get(working_folder.remote(), timeout=90))
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    packed = session / "runtime_resources/working_dir_files"
    print("sent", [path.name for path in packed.rglob("*")] if packed.exists() else [])
"""


@pytest.mark.parametrize("before", ["", "import ray"])
def test_folder_of_a_driver_under_uv_is_not_sent(tmp_path: Path, before: str) -> None:
    (tmp_path / ".env").write_text(PLANTED)
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "driver_script.py").write_text(CODE.format(before=before))
    # Ray looks for a process above it whose command line starts with "uv run".
    (tmp_path / "run").write_text(f"{sys.executable} driver_script.py; echo code $?\n")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["uv", "run"],
        executable="/bin/sh",
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert f"folder {tmp_path}" in done.stdout and "sent []" in done.stdout, done.stdout[-3000:]
    assert "code 0" in done.stdout
