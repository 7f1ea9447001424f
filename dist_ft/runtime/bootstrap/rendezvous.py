"""Where the processes of a run meet: on loopback if all are on one machine.

torch's store listens on all interfaces of rank 0's machine, and gloo on the interface of the host's
name. Anyone who reaches the store can stop a run or change what its ranks read from each other. So
the store listens on rank 0's own address only, and if that is a loopback address, so do gloo and
NCCL.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from dist_ft.config.sections.cluster import INTERFACE_VARIABLES

if TYPE_CHECKING:
    from torch.distributed import Store

log = logging.getLogger("dist_ft.network")
LOOPBACK_ADDRESSES = ("127.0.0.1", "::1")
LOOPBACK_INTERFACES = ("lo", "lo0")
"""Names of the loopback interface on Linux and macOS."""
ADDRESS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")


def loopback_address() -> str | None:
    """Return a loopback address of this machine; None if it has none (in a bare namespace)."""
    for address in LOOPBACK_ADDRESSES:
        with contextlib.suppress(OSError):
            _free_port_of(address)
            return address
    return None


def free_port(address: str) -> int:
    """Return a TCP port that is free on an address of this machine, or on all of them.

    Another process may take it before it is used.
    """
    try:
        return _free_port_of(address)
    except OSError:
        # An address that a router translates: this machine itself does not have it.
        return _free_port_of("")


def _free_port_of(address: str) -> int:
    with socket.socket(_family(address)) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@contextlib.contextmanager
def restored_environment() -> Iterator[None]:
    """Restore the variables of rendezvous at the end: the caller may have another run after it."""
    names = (*ADDRESS_VARIABLES, *INTERFACE_VARIABLES)
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def meet_alone() -> None:
    """Set the variables of a world of one that meets itself on this machine."""
    address = loopback_address() or LOOPBACK_ADDRESSES[0]
    os.environ["MASTER_ADDR"] = address
    os.environ["MASTER_PORT"] = str(free_port(address))
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0"
    os.environ["WORLD_SIZE"] = "1"


def stay_on_loopback() -> None:
    """Have gloo and NCCL use loopback only, if rank 0's address is one.

    Then all ranks are on this machine, or they could not reach it. Interfaces that are set already
    stay. Called before a process group exists: the backends read the variables when they connect.
    """
    if not is_loopback(os.environ.get("MASTER_ADDR", "")):
        return

    interfaces = [name for _, name in socket.if_nameindex()]
    for name in LOOPBACK_INTERFACES:
        if name in interfaces:
            # "=" requests an exact match; without it NCCL matches by prefix
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            return


def is_loopback(address: str) -> bool:
    """Return whether a literal address, or "localhost", is a loopback address."""
    # Other names are not looked up: a machine may know its own name as 127.0.1.1, which is not
    # what the other machines know it as.
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def open_store(timeout: timedelta) -> Store | None:
    """Return rank 0's store, which listens on the address of the environment only.

    None on other ranks, under torchrun, whose agent has the store, and where this machine does not
    have the address itself (behind a proxy, or a name): then torch opens one in its own way.
    """
    import torch.distributed as dist

    has_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if os.environ.get("RANK") != "0" or has_agent_store:
        return None

    address, port_text = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not port_text.isdecimal():
        return None  # torch's own error names the variable

    port = int(port_text)
    listener = _listen(address, port)
    if listener is None:
        return None

    store = dist.TCPStore(
        address,
        port,
        int(os.environ["WORLD_SIZE"]),
        is_master=True,
        timeout=timeout,
        master_listen_fd=listener.detach(),  # the store closes it
    )

    # With the prefix of torch's own way, in which the other ranks join.
    return dist.PrefixStore("default_pg", store)


def _listen(address: str, port: int) -> socket.socket | None:
    """Return a socket that listens on a literal address of this machine, None if it has it not."""
    try:
        ipaddress.ip_address(address)
    except ValueError:
        if address != "localhost":
            return None
        address = LOOPBACK_ADDRESSES[0]

    try:
        return socket.create_server((address, port), family=_family(address), backlog=2048)
    except OSError as error:
        log.debug("the store cannot listen on %s:%d alone (%s)", address, port, error)
        return None
