"""Where a Ray of the command's own keeps its files; its sockets are in integration/test_listening."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_ft.runtime.ray_backend import local_cluster


@pytest.fixture(autouse=True)
def no_ray_variables(monkeypatch):
    for name in ("RAY_TMPDIR", local_cluster.SINGLE_MACHINE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


class Ray(SimpleNamespace):
    """Notes what it is started with; the names are those that `local_cluster` uses."""

    def __init__(self) -> None:
        constants = SimpleNamespace(ENABLE_RAY_CLUSTER=True)
        super().__init__(_private=SimpleNamespace(ray_constants=constants), started={})

    def init(self, **options) -> None:
        self.started = {
            **options,
            "several machines": self._private.ray_constants.ENABLE_RAY_CLUSTER,
            "variable": os.environ.get(local_cluster.SINGLE_MACHINE_VARIABLE),
        }

    def shutdown(self) -> None:
        self.started = {}


def test_ray_starts_on_loopback_with_private_files(tmp_path, monkeypatch):
    temp = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(temp))
    ray = Ray()
    with local_cluster.shut_down_at_end(ray):
        local_cluster.start(ray, num_cpus=3)
        assert ray.started["_node_ip_address"] == "127.0.0.1" and ray.started["num_cpus"] == 3
        assert not ray.started["several machines"] and ray.started["variable"] == "0"
        folder = Path(ray.started["_temp_dir"])
        assert folder.parent == temp / f"dist_ft-{os.geteuid()}"
        assert folder.parent.stat().st_mode & 0o077 == 0

    # The process may join a cluster of several machines later.
    assert ray._private.ray_constants.ENABLE_RAY_CLUSTER
    assert local_cluster.SINGLE_MACHINE_VARIABLE not in os.environ
    assert not list(folder.parent.iterdir())


def test_logs_stay_after_an_error():
    ray = Ray()
    with pytest.raises(ZeroDivisionError), local_cluster.shut_down_at_end(ray):
        local_cluster.start(ray)
        folder = Path(ray.started["_temp_dir"])
        raise ZeroDivisionError
    assert folder.is_dir() and not ray.started
    lock = folder.with_name(f"{folder.name}.lock")
    folder.rmdir()
    lock.unlink()


def test_path_that_is_too_long_for_sockets_is_replaced(tmp_path, monkeypatch):
    """Ray would not start: the kernel limits the paths of sockets."""
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    ray = Ray()
    with local_cluster.shut_down_at_end(ray):
        local_cluster.start(ray)
        assert ray.started["_temp_dir"].startswith(f"/tmp/dist_ft-{os.geteuid()}/ray-")


def test_folder_of_the_user_is_left_to_ray(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/somewhere")
    ray = Ray()
    local_cluster.start(ray)
    assert "_temp_dir" not in ray.started
