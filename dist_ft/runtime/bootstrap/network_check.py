"""What joins the workers, tried before step 1: is a sum over all right, how fast is it, and each pair of nodes?

Sums hold small whole numbers, so that a right one is exact. Pairs of nodes exchange in rounds in
which no node has two partners (a round-robin tournament), so that no pair disturbs another. A slow
pair, or a node slow to most others, is named; wrong bytes end the run. What was found is kept with
the run (`network.json`). Guarantees: every worker makes the same calls. Does not measure links
within a node.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError, StorageError, WorkerError
from dist_ft.core.world import Collectives, World, raise_together
from dist_ft.runtime import machine
from dist_ft.storage.filesystem import Store

log = logging.getLogger("dist_ft.network")
FILE = "network.json"
NODE = "DIST_FT_NODE"
"""Variable by which a supervisor tells its process the node's name."""
MOST_ROUNDS = 31
"""So all pairs of up to 32 nodes are tried.

Of more, each node with 31 others, which is enough to find a slow node.
"""
TIMES_SLOWER = 2.0
"""A pair this many times slower than what the faster quarter reaches is slow."""
TRIES = 3
SIZES = {"cpu": (2**16, 2**22), "cuda": (2**20, 2**28)}
"""Bytes of the sums: a small one, whose time is latency, and a large one, whose time is bandwidth."""
PAIR_BYTES = {"cpu": 2**21, "cuda": 2**26}


@dataclass(frozen=True)
class Sum:
    """A sum over all workers: bytes of each, best seconds, MB/s a worker sends (as nccl-tests' bus bandwidth)."""

    num_bytes: int
    seconds: float
    mb_s: float


@dataclass(frozen=True)
class Link:
    """What two nodes (by number) reach when both send to the other at once: MB/s each way."""

    one: int
    other: int
    mb_s: float


@dataclass(frozen=True)
class Network:
    """What was found. `nodes`: names; `machines`: what each of them is (`machine.describe`).

    `slow`: for people.
    """

    world_size: int
    nodes: tuple[str, ...]
    machines: tuple[dict[str, Any], ...]
    sums: tuple[Sum, ...] = ()
    links: tuple[Link, ...] = ()
    slow: tuple[str, ...] = ()
    seconds: float = 0.0
    backend: str = field(default="gloo")


def prepare(config: RunConfig) -> None:
    """Set the variables of nccl and gloo that the config asks for; before a process group is made.

    Raises ConfigError if this node has no such interface.
    """
    cluster = config.cluster
    os.environ.update(cluster.network_variables)
    if cluster.network_interface is None:
        return
    has = [name for _, name in socket.if_nameindex()]
    for name in cluster.network_interface.split(","):
        if name not in has:
            raise ConfigError(
                [
                    f"cluster.network_interface={cluster.network_interface}: node {node_name()} has no "
                    f"{name}; it has {', '.join(has)}; name one that all nodes have"
                ],
                "network",
            )
    os.environ["NCCL_SOCKET_IFNAME"] = (
        f"={cluster.network_interface}"  # exactly these, not what begins so
    )
    os.environ["GLOO_SOCKET_IFNAME"] = cluster.network_interface


def node_name() -> str:
    """Return the name of this node, as the supervisor knows it."""
    return os.environ.get(NODE) or socket.gethostname()


def check(
    config: RunConfig, world: World, comms: Collectives, store: Store, after: str = ""
) -> None:
    """Try the network if the config asks for it, keep and log what was found; a collective call.

    After a failure (`after`) the nodes of the start before are not tried again: that start needs
    the time. Raises WorkerError where a sum or what a node received is wrong.
    """
    wish = config.cluster.network_check
    if wish == "off" or (world.num_ranks == 1 and wish == "auto"):
        return
    names = comms.all_gather(node_name())
    leaders = [
        rank for rank, local in enumerate(comms.all_gather(world.rank_of_node)) if local == 0
    ]
    nodes = tuple(names[rank] for rank in leaders)
    if wish == "auto" and len(leaders) == 1:
        return
    if comms.broadcast(world.rank == 0 and bool(after) and kept_nodes(store) == nodes):
        return
    found = measure(config, world, comms, leaders, nodes)
    if world.rank == 0:
        _tell(found, store)


def measure(
    config: RunConfig,
    world: World,
    comms: Collectives,
    leaders: Sequence[int],
    nodes: tuple[str, ...],
) -> Network:
    """Return what the workers reach; `leaders`: the first rank of each node. A collective call."""
    import torch

    begun = time.monotonic()
    kind = "cuda" if config.cluster.gpus_per_worker > 0 else "cpu"
    device = torch.device(kind)
    told = comms.all_gather(machine.describe(kind == "cuda") if world.rank in leaders else None)
    sums, wrong = _sums(world, comms, device, SIZES[kind]) if world.num_ranks > 1 else ((), False)
    links, bad = (
        _links(world, comms, device, leaders, PAIR_BYTES[kind]) if len(leaders) > 1 else ((), ())
    )
    raise_together(comms, _wrong(wrong, bad, nodes) if wrong or bad else None)
    slow = judge(links, nodes, config.cluster.network_min_mb_s)
    return Network(
        world.num_ranks,
        nodes,
        tuple(one for one in told if one is not None),
        sums,
        links,
        tuple(slow),
        round(time.monotonic() - begun, 3),
        "nccl" if kind == "cuda" else "gloo",
    )


def _wrong(wrong: bool, bad: Sequence[tuple[int, int]], nodes: Sequence[str]) -> WorkerError:
    where = "; ".join(f"between node {nodes[one]} and node {nodes[other]}" for one, other in bad)
    what = (
        f"other bytes arrive than were sent {where}" if bad else "a sum over all workers is wrong"
    )
    return WorkerError(
        f"network check: {what}; training would be wrong in silence; take these nodes out, look at "
        "their GPUs, network cards and NCCL version; cluster.network_check=off trains without looking"
    )


def _sums(
    world: World, comms: Collectives, device: Any, sizes: Sequence[int]
) -> tuple[tuple[Sum, ...], bool]:
    """Return how fast sums over all workers are, and whether one is wrong on some of them."""
    import torch
    import torch.distributed as dist

    found, wrong = [], False
    for num_bytes in sizes:
        values = (
            torch.arange(num_bytes // 4, device=device) % 7
        ).float()  # sums stay exact up to 10^5 workers
        expected, times = values * sum(1 + rank % 16 for rank in range(world.num_ranks)), []
        for _ in range(TRIES):
            mine = values * (1 + world.rank % 16)
            comms.barrier()
            _wait(device)
            begun = time.perf_counter()
            dist.all_reduce(mine)
            _wait(device)
            times.append(time.perf_counter() - begun)
            wrong |= not torch.equal(mine, expected)
        seconds = min(max(each) for each in zip(*comms.all_gather(times), strict=True))
        found.append(
            Sum(
                num_bytes,
                seconds,
                2 * (world.num_ranks - 1) / world.num_ranks * num_bytes / seconds / 1e6,
            )
        )
    return tuple(found), any(comms.all_gather(wrong))


def _links(
    world: World, comms: Collectives, device: Any, leaders: Sequence[int], num_bytes: int
) -> tuple[tuple[Link, ...], tuple[tuple[int, int], ...]]:
    """Return how fast each pair of nodes is, and the pairs between which bytes change."""
    here = leaders.index(world.rank) if world.rank in leaders else None
    found: list[tuple[Link, bool]] = []
    for pairs in rounds(len(leaders))[:MOST_ROUNDS]:
        mine = next((pair for pair in pairs if here in pair), None)
        if here is not None and mine is not None:
            other = mine[1] if mine[0] == here else mine[0]
            seconds, right = _exchange(leaders[here], leaders[other], device, num_bytes)
            found.append((Link(*mine, num_bytes / seconds / 1e6), right))
        comms.barrier()
    told = [one for own in comms.all_gather(found) for one in own]
    worst: dict[tuple[int, int], float] = {}
    for link, _ in told:  # both ends tell of it
        worst[link.one, link.other] = min(link.mb_s, worst.get((link.one, link.other), link.mb_s))
    return (
        tuple(Link(*pair, mb_s) for pair, mb_s in sorted(worst.items())),
        tuple(sorted({(link.one, link.other) for link, right in told if not right})),
    )


def _exchange(own: int, other: int, device: Any, num_bytes: int) -> tuple[float, bool]:
    """Send to and receive from another rank at once.

    Return the best time, and whether what came is right.
    """
    import torch
    import torch.distributed as dist

    pattern = torch.arange(num_bytes // 4, device=device, dtype=torch.int32)
    out, came, times = pattern + own, torch.empty_like(pattern), []
    for _ in range(TRIES):
        _wait(device)
        begun = time.perf_counter()
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, out, other), dist.P2POp(dist.irecv, came, other)]
        ):
            work.wait()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return min(times[1:]), bool(torch.equal(came, pattern + other))


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Return all pairs of `count` players in rounds in which each plays at most once (the circle method). Pure."""
    players: list[int] = [*range(count), *([-1] if count % 2 else [])]
    found = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        found.append(sorted((min(pair), max(pair)) for pair in pairs if -1 not in pair))
        players = [players[0], players[-1], *players[1:-1]]
    return found


def judge(links: Sequence[Link], nodes: Sequence[str], least_mb_s: float = 0.0) -> list[str]:
    """Return a line for each node that is slow to most others, and for each further slow pair.

    Pure.
    """
    if not links:
        return []
    usual = sorted((link.mb_s for link in links), reverse=True)[len(links) // 4]
    slow = [link for link in links if link.mb_s * TIMES_SLOWER < usual or link.mb_s < least_mb_s]
    said, named = [], set()
    for number, name in enumerate(nodes):
        all_of = [link for link in links if number in (link.one, link.other)]
        bad = [link for link in slow if link in all_of]
        if len(nodes) > 2 and 2 * len(bad) > len(all_of):
            named.add(number)
            said.append(
                f"node {name} is slow to {len(bad)} of {len(all_of)} other nodes: "
                f"{min(link.mb_s for link in bad):,.0f} MB/s (usual here: {usual:,.0f})"
            )
    return said + [
        f"nodes {nodes[link.one]} and {nodes[link.other]}: {link.mb_s:,.0f} MB/s each way (usual here: "
        f"{usual:,.0f}" + (f", asked for: {least_mb_s:,.0f})" if link.mb_s < least_mb_s else ")")
        for link in slow
        if not named & {link.one, link.other}
    ]


def kept_nodes(store: Store) -> tuple[str, ...] | None:
    """Return the nodes of the last start that was tried.

    None if none was, or it can not be read.
    """
    try:
        found = json.loads(store.read(FILE)) if store.exists(FILE) else None
        return tuple(found["nodes"]) if found else None
    except (ValueError, KeyError, TypeError, StorageError):
        return None


def _tell(found: Network, store: Store) -> None:
    """Log what was found and keep it with the run (rank 0 only)."""
    for large in found.sums[-1:]:
        pairs = (
            (
                f"; {len(found.links)} pairs of nodes, {min(link.mb_s for link in found.links):,.0f} to "
                f"{max(link.mb_s for link in found.links):,.0f} MB/s each way"
            )
            if found.links
            else ""
        )
        log.info(
            "network: a sum of %g MiB over %d workers takes %.1f ms (%s MB/s)%s; looked at in %.1f s",
            large.num_bytes / 2**20,
            found.world_size,
            1000 * large.seconds,
            f"{large.mb_s:,.0f}",
            pairs,
            found.seconds,
        )
    for line in found.slow:
        log.warning("network: %s; every step waits for it", line)
    try:
        store.write(FILE, (json.dumps(asdict(found), indent=1) + "\n").encode())
    except StorageError as error:
        log.warning("network: what was found is not kept: %s", error)
