"""Network namespaces of this machine, joined by links that a test cuts or slows down."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

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
OWN_NAME = re.compile(r"df(\d+)-\w+")
"""Names contain the id of the process that created them, so that leftovers can be removed."""
NETNS_FOLDER = "/var/run/netns/"
CLONE_NEWNET = 0x40000000


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _own_name(name: str) -> str:
    return f"df{os.getpid()}-{name}"


def _clear_stale() -> None:
    """Remove the namespaces, links and bridges of test processes that have ended."""
    links = subprocess.run(["ip", "-o", "link", "show"], capture_output=True, text=True).stdout
    namespaces = os.listdir(NETNS_FOLDER) if os.path.isdir(NETNS_FOLDER) else []
    for listing, command in ((" ".join(namespaces), ["netns", "del"]), (links, ["link", "del"])):
        for found in OWN_NAME.finditer(listing):
            if not os.path.exists(f"/proc/{found[1]}"):
                subprocess.run(["ip", *command, found[0]], capture_output=True)


@contextmanager
def _namespaces(names: tuple[str, ...]) -> Iterator[None]:
    """Create namespaces; skip the test where that is impossible."""
    created = []
    try:
        try:
            _clear_stale()
            for name in names:
                ip("netns", "add", name)
                created.append(name)
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(
                "needs network namespaces, which cannot be created here "
                f"({error.stderr.decode().strip()})"
            )
        yield
    finally:
        for name in created:
            ip("netns", "del", name)


@contextmanager
def pair() -> Iterator[list[dict[str, str]]]:
    """Yield the variables of each of two ranks (`ranks.start_ranks`, `each`), joined by a link."""
    names = (_own_name("a"), _own_name("b"))
    with _namespaces(names):
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
    """Yield (namespace, address) of `size` machines, each with a link to a bridge; this one is
    `HOST`."""
    names = tuple(_own_name(str(number)) for number in range(size))
    places = [(name, f"10.213.8.{number + 2}") for number, name in enumerate(names)]
    with _namespaces(names):
        bridge = _own_name("br")
        ip("link", "add", bridge, "type", "bridge")
        try:
            ip("addr", "add", f"{HOST}/24", "dev", bridge)
            ip("link", "set", bridge, "up")
            for name, address in places:
                ip("link", "add", f"{name}u", "type", "veth", "peer", "name", LINK, "netns", name)
                ip("link", "set", f"{name}u", "master", bridge, "up")
                ip("-n", name, "addr", "add", f"{address}/24", "dev", LINK)
                ip("-n", name, "link", "set", LINK, "up")
            yield places
        finally:
            # The kernel removes a namespace's links later, when its last process has ended.
            # Until then, the next test could not create links of the same names.
            for name, _ in places:
                subprocess.run(["ip", "link", "del", f"{name}u"], capture_output=True)
            ip("link", "del", bridge)


def enter(path: str) -> None:
    """Move this thread, and what it starts, into the namespace at a path (`NETNS_FOLDER` and its
    name)."""
    with open(path) as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {path}")


def cut_link(name: str) -> None:
    """Take the link of a namespace down: packets vanish without an error."""
    ip("-n", name, "link", "set", LINK, "down")


def restore_link(name: str) -> None:
    """Bring the link of a namespace up again."""
    ip("-n", name, "link", "set", LINK, "up")


def throttle(name: str, rate: str, queue_bytes: int) -> None:
    """Limit the rate of what leaves a namespace; a full queue drops packets, as in a switch."""
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


class PacketCount(NamedTuple):
    """Packets that a throttled link has sent, and that it dropped."""

    sent: int
    dropped: int


def count_packets(name: str) -> PacketCount:
    """Return the packets of a throttled link."""
    done = subprocess.run(
        ["tc", "-n", name, "-s", "qdisc", "show", "dev", LINK],
        check=True,
        capture_output=True,
        text=True,
    )
    found = re.search(r"Sent \d+ bytes (\d+) pkt \(dropped (\d+)", done.stdout)
    assert found is not None, done.stdout
    return PacketCount(int(found[1]), int(found[2]))
