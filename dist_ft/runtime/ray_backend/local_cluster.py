"""A Ray of this command's own, on this machine: it listens on loopback, its files are private.

Ray gives a node the address of the machine in its network, even where 127.0.0.1 is requested, and
its processes then listen on all interfaces. Only on macOS and Windows it takes loopback, on which
every process of Ray then listens. That is what this module has it do. Ray's folder, which holds
sockets and logs and which Ray opens to all users, lies in a folder that only this user can access.
Clusters that a user joins are not changed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_ft.core import scratch

OBJECT_STORE_BYTES = 128 * 2**20
LOOPBACK = "127.0.0.1"
SINGLE_MACHINE_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Whether Ray may have nodes on several machines, which needs addresses that others can reach."""
MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
"""Bytes of a socket's path that the system allows."""
_folders: list[scratch.Scratch] = []


def start(ray: Any, **options: Any) -> None:
    """Start a cluster of one node and connect to it; `options`: further ones of `ray.init`.

    Raises:
        Exception: Ray did not start; it raises `Exception` itself.
    """
    folder = _create_folder()
    if folder is not None:
        options["_temp_dir"] = str(folder)

    with _taking_loopback(ray):
        ray.init(
            address="local",  # never a stale cluster of another run
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address=LOOPBACK,
            **options,
        )


@contextlib.contextmanager
def shut_down_at_end(ray: Any) -> Iterator[None]:
    """Shut Ray down at the end, and remove its files unless they explain an error."""
    try:
        yield
    except BaseException:
        ray.shutdown()
        _release_folders(remove=False)
        raise
    ray.shutdown()
    _release_folders(remove=True)


def logs_folder(ray: Any) -> str:
    """Return the folder with the logs of Ray on this node."""
    with contextlib.suppress(Exception):  # no public part of Ray gives it in all versions
        return str(ray._private.worker._global_node.get_logs_dir_path())
    return "/tmp/ray"


def _create_folder() -> Path | None:
    """Return a private folder for Ray; None if its path is too long, or if RAY_TMPDIR names one."""
    if "RAY_TMPDIR" in os.environ:
        return None

    # The system's own temporary folder has a short path where that of TMPDIR is too long.
    socket_in_session = f"/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    for temp in (None, "/tmp"):
        folder = scratch.create("ray", temp)
        if len(f"{folder.path}{socket_in_session}".encode()) <= MAX_SOCKET_PATH:
            _folders.append(folder)
            return folder.path
        folder.remove()
    return None


def _release_folders(remove: bool) -> None:
    while _folders:
        folder = _folders.pop()
        if remove:
            folder.remove()
        else:
            folder.release()


@contextlib.contextmanager
def _taking_loopback(ray: Any) -> Iterator[None]:
    """Have Ray take loopback as this node's address, in this process and in those it starts."""
    constants = ray._private.ray_constants
    before = constants.ENABLE_RAY_CLUSTER, os.environ.get(SINGLE_MACHINE_VARIABLE)
    constants.ENABLE_RAY_CLUSTER = False
    os.environ[SINGLE_MACHINE_VARIABLE] = "0"
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER, variable = before
        if variable is None:
            del os.environ[SINGLE_MACHINE_VARIABLE]
        else:
            os.environ[SINGLE_MACHINE_VARIABLE] = variable
