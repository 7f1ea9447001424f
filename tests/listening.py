"""The sockets on which a run's processes listen, read from the kernel's tables (Linux)."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MARK = "DIST_FT_TEST_MARK"
"""Environment variable whose value all processes of a run inherit."""
LISTEN_STATE, UNCONNECTED_STATE = "0A", "07"
TABLES = {
    "tcp": LISTEN_STATE,
    "tcp6": LISTEN_STATE,
    "udp": UNCONNECTED_STATE,
    "udp6": UNCONNECTED_STATE,
}
"""File of the kernel -> state of the sockets in it that wait for anyone."""


@dataclass(frozen=True)
class Listener:
    """A socket that waits for connections or datagrams.

    Attributes:
        program: start of the command line of its process.
        kind: tcp, tcp6, udp or udp6.
        address: where it listens.
        port: its port.
    """

    program: str
    kind: str
    address: str
    port: int

    @property
    def is_loopback(self) -> bool:
        address = ipaddress.ip_address(self.address)
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        return address.is_loopback


def listeners(mark: str) -> set[Listener]:
    """Return the listeners of all processes whose environment has `MARK` with this value."""
    found = set()
    for process in marked_processes(mark):
        inodes = _socket_inodes(process)
        for kind, state in TABLES.items():
            for inode, address, port in _table(process, kind, state):
                if inode in inodes:
                    found.add(Listener(_program(process), kind, address, port))
    return found


def marked_processes(mark: str) -> set[Path]:
    """Return the /proc folders of the processes that were started with the mark, or by such one.

    Ray's workers write their title over their environment; then their parent tells.
    """
    variable = f"{MARK}={mark}".encode()
    marked: set[str] = set()
    parents: dict[str, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            parents[process.name] = fields[1]
            if variable in (process / "environ").read_bytes().split(b"\0"):
                marked.add(process.name)

    # Until no child is added: the kernel's order of processes is not that of generations.
    while True:
        children = {child for child, parent in parents.items() if parent in marked} - marked
        if not children:
            return {Path("/proc", number) for number in marked}
        marked |= children


def _socket_inodes(process: Path) -> set[str]:
    inodes = set()
    with contextlib.suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(descriptor)
                if target.startswith("socket:["):
                    inodes.add(target[len("socket:[") : -1])
    return inodes


def _table(process: Path, kind: str, state: str) -> Iterator[tuple[str, str, int]]:
    """Yield (inode, address, port) of the sockets in a table of the process's network namespace."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = (process / "net" / kind).read_text().splitlines()[1:]
    for line in lines:
        fields = line.split()
        if fields[3] == state:
            address, port = fields[1].split(":")
            yield fields[9], _decoded(address), int(port, 16)


def _decoded(text: str) -> str:
    """Return an address that the kernel prints as words of four bytes in the machine's order."""
    words = [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
    raw = struct.pack(f"={len(words)}I", *words)
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def _program(process: Path) -> str:
    with contextlib.suppress(OSError):
        text = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        return text.strip()[:160]
    return "(ended)"
