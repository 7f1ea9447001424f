"""Ranks of one machine meet on loopback; torch's store listens on rank 0's address only."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import listening
import ports
import pytest

from dist_ft.runtime.bootstrap import rendezvous

RANK = """
import json, os, sys
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import listening
from datetime import timedelta
from pathlib import Path
from dist_ft.runtime import local
from dist_ft.runtime.bootstrap import rendezvous

with rendezvous.restored_environment():
    if "MASTER_ADDR" not in os.environ:
        rendezvous.meet_alone()
    rendezvous.stay_on_loopback()
    local._init_process_group("gloo", timedelta(seconds=60))
    total = torch.ones(1)
    dist.all_reduce(total)
    second = dist.new_group(backend="gloo")
    dist.all_reduce(total, group=second)
    inodes = listening._socket_inodes(Path("/proc/self"))
    found = [
        [kind, address]
        for kind, state in listening.TABLES.items()
        for inode, address, port in listening._table(Path("/proc/self"), kind, state)
        if inode in inodes
    ]
    dist.barrier()
    dist.destroy_process_group()
print(json.dumps([total.item(), found, os.environ.get("MASTER_ADDR")]), flush=True)
os._exit(0)
"""
TESTS = Path(__file__).resolve().parents[3]


def run_ranks(count: int, **variables: str) -> list[tuple[float, list[list[str]], str | None]]:
    """Run ranks; return of each its sum, its listeners (kind, address) and MASTER_ADDR after it."""
    hidden = {*rendezvous.ADDRESS_VARIABLES, *rendezvous.INTERFACE_VARIABLES}
    clean = {key: value for key, value in os.environ.items() if key not in hidden}
    running = []
    for rank in range(count):
        own = {}
        if variables:
            own = {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(TESTS)],
                env={**clean, **own, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    results = []
    for process in running:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
        results.append(tuple(json.loads(output)))
    return results


def test_two_ranks_that_meet_on_loopback_listen_nowhere_else():
    results = run_ranks(2, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports.find_free_port()))
    assert [total for total, _, _ in results] == [4.0, 4.0]
    for _, found, address in results:
        assert found and {where for _, where in found} == {"127.0.0.1"}
        assert address == "127.0.0.1"  # the caller's, as it was


def test_rank_that_is_alone_meets_itself_on_loopback_and_leaves_no_variables():
    ((total, found, address),) = run_ranks(1)
    assert total == 1.0 and {where for _, where in found} == {"127.0.0.1"} and address is None


def test_localhost_is_loopback():
    results = run_ranks(2, MASTER_ADDR="localhost", MASTER_PORT=str(ports.find_free_port()))
    for _, found, _ in results:
        assert {where for _, where in found} <= {"127.0.0.1", "::1"}


def test_interface_of_the_user_stays():
    results = run_ranks(
        2,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(ports.find_free_port()),
        GLOO_SOCKET_IFNAME="lo",
        NCCL_SOCKET_IFNAME="eth7",
    )
    assert [total for total, _, _ in results] == [4.0, 4.0]


def test_store_of_several_machines_listens_on_the_address_of_rank_0(monkeypatch):
    """127.0.0.2 stands for it: gloo is not confined to loopback by an address of the network."""
    monkeypatch.setattr(rendezvous, "is_loopback", lambda address: False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.2")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    rendezvous.stay_on_loopback()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    listener = rendezvous._listen("127.0.0.2", ports.find_free_port())
    assert listener is not None and listener.getsockname()[0] == "127.0.0.2"
    listener.close()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("head.example", False),
        ("", False),
    ],
)
def test_which_addresses_are_loopback(address, expected):
    """Names are not looked up: a machine may have 127.0.1.1 as its own name's address."""
    assert rendezvous.is_loopback(address) is expected


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1"},
        {"TORCHELASTIC_USE_AGENT_STORE": "True"},
        {"MASTER_ADDR": "head.example"},
        {"MASTER_ADDR": "203.0.113.7"},  # not of this machine
        {"MASTER_PORT": "none"},
    ],
)
def test_where_torch_opens_the_store_in_its_own_way(monkeypatch, variables):
    from datetime import timedelta

    base = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    base["MASTER_PORT"] = str(ports.find_free_port())
    for name, value in {**base, **variables}.items():
        monkeypatch.setenv(name, value)
    assert rendezvous.open_store(timedelta(seconds=5)) is None


def test_port_in_use_is_left_to_torch():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert rendezvous._listen("127.0.0.1", taken.getsockname()[1]) is None


def test_port_is_free_on_an_address_that_is_not_of_this_machine():
    assert rendezvous.free_port("203.0.113.7") > 0
    assert rendezvous.loopback_address() in rendezvous.LOOPBACK_ADDRESSES


def test_listeners_of_a_process_are_found():
    """The tables are read right: loopback and not, IPv4 and IPv6, TCP and UDP."""
    program = (
        "import socket, time\nheld = [socket.create_server(('127.0.0.1', 0)), "
        "socket.create_server(('0.0.0.0', 0)), socket.socket(type=socket.SOCK_DGRAM)]\n"
        "held[2].bind(('127.0.0.1', 0))\n"
        "if socket.has_ipv6:\n    held.append(socket.create_server(('::', 0), family=socket.AF_INET6))\n"
        "print(flush=True)\ntime.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, listening.MARK: "here"},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    try:
        found = {(one.kind, one.address): one.is_loopback for one in listening.listeners("here")}
    finally:
        process.kill()
        process.wait()
    assert found[("tcp", "127.0.0.1")] and found[("udp", "127.0.0.1")]
    assert not found[("tcp", "0.0.0.0")]
    assert not found.get(("tcp6", "::"), False)
