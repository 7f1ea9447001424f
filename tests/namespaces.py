"""Network namespaces of this machine, joined by links that a test cuts or slows. Nothing leaves them."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

MARKS = [
    pytest.mark.root,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None,
        reason="needs root and `ip` (network namespaces)",
    ),
]
LINK = "ve0"
"""The name of the link inside every namespace."""
HOST = "10.213.8.1"
OURS = re.compile(r"df(\d+)-\w+")
"""Names carry the process that made them, so that another may clear away what one that was killed left."""
INSIDE = "/var/run/netns/"
CLONE_NEWNET = 0x40000000


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _own(name: str) -> str:
    return f"df{os.getpid()}-{name}"


def _clear_stale() -> None:
    """Remove the namespaces and bridges of test processes that are gone."""
    bridges = subprocess.run(
        ["ip", "-o", "link", "show", "type", "bridge"], capture_output=True, text=True
    ).stdout
    places = os.listdir(INSIDE) if os.path.isdir(INSIDE) else []
    for listing, command in ((" ".join(places), ["netns", "del"]), (bridges, ["link", "del"])):
        for found in OURS.finditer(listing):
            if not os.path.exists(f"/proc/{found[1]}"):
                subprocess.run(["ip", *command, found[0]], capture_output=True)


@contextmanager
def _made(names: tuple[str, ...]) -> Iterator[None]:
    """Make namespaces; skip the test where that is impossible."""
    made = []
    try:
        try:
            _clear_stale()
            for name in names:
                ip("netns", "add", name)
                made.append(name)
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(
                f"needs network namespaces, which can not be made here ({error.stderr.decode().strip()})"
            )
        yield
    finally:
        for name in made:
            ip("netns", "del", name)


@contextmanager
def pair() -> Iterator[list[dict[str, str]]]:
    """Yield what each of two ranks needs to know (`ranks.start_ranks`, `each`); a link joins their namespaces."""
    names = (_own("a"), _own("b"))
    with _made(names):
        ip(
            "-n",
            names[0],
            "link",
            "add",
            LINK,
            "type",
            "veth",
            "peer",
            "name",
            LINK,
            "netns",
            names[1],
        )
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.213.7.{number + 1}/24", "dev", LINK)
            ip("-n", name, "link", "set", LINK, "up")
        yield [
            {"NETNS": name, "MASTER_ADDR": "10.213.7.1", "GLOO_SOCKET_IFNAME": LINK}
            for name in names
        ]


@contextmanager
def star(size: int) -> Iterator[list[tuple[str, str]]]:
    """Yield (namespace, address) of so many machines, each on a link of its own to a bridge; this one is `HOST`."""
    names = tuple(_own(str(number)) for number in range(size))
    found = [(name, f"10.213.8.{number + 2}") for number, name in enumerate(names)]
    with _made(names):
        bridge = _own("br")
        ip("link", "add", bridge, "type", "bridge")
        try:
            ip("addr", "add", f"{HOST}/24", "dev", bridge)
            ip("link", "set", bridge, "up")
            for name, address in found:
                ip("link", "add", f"{name}u", "type", "veth", "peer", "name", LINK, "netns", name)
                ip("link", "set", f"{name}u", "master", bridge, "up")
                ip("-n", name, "addr", "add", f"{address}/24", "dev", LINK)
                ip("-n", name, "link", "set", LINK, "up")
            yield found
        finally:
            ip("link", "del", bridge)


def enter(path: str) -> None:
    """Move this thread, and what it starts, into the namespace at a path (`INSIDE` and its name)."""
    with open(path) as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"can not enter {path}")


def cut(name: str) -> None:
    """Take the link of a namespace down: packets vanish, nobody is told."""
    ip("-n", name, "link", "set", LINK, "down")


def join(name: str) -> None:
    """Take it up again."""
    ip("-n", name, "link", "set", LINK, "up")


def throttle(name: str, rate: str, queue_bytes: int) -> None:
    """Slow what leaves a namespace; what finds the queue full is lost, as in a switch."""
    subprocess.run(
        [
            "tc",
            "-n",
            name,
            "qdisc",
            "replace",
            "dev",
            LINK,
            "root",
            "tbf",
            "rate",
            rate,
            "burst",
            "16kb",
            "limit",
            str(queue_bytes),
        ],
        check=True,
        capture_output=True,
    )


def packets(name: str) -> tuple[int, int]:
    """Return how many packets a throttled link has sent, and how many it has lost."""
    told = subprocess.run(
        ["tc", "-n", name, "-s", "qdisc", "show", "dev", LINK],
        check=True,
        capture_output=True,
        text=True,
    )
    found = re.search(r"Sent \d+ bytes (\d+) pkt \(dropped (\d+)", told.stdout)
    assert found is not None, told.stdout
    return int(found[1]), int(found[2])
