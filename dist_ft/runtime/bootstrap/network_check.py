"""Checks the network before step 1: whether sums are correct, their speed, and pairs of nodes.

A slow pair of nodes, or a node slow to most others, is reported; wrong bytes end the run. The
result is stored with the run (`network.json`). Guarantees: every worker makes the same calls.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypedDict

from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError, StorageError, WorkerError
from dist_ft.core.world import Collectives, World, raise_together
from dist_ft.runtime import machine
from dist_ft.runtime.bootstrap.network_measurement import (
    PAIR_BYTES,
    SUM_BYTES,
    Link,
    LinkMeasurement,
    Sum,
    SumMeasurement,
    measure_links,
    measure_sums,
)
from dist_ft.runtime.machine import NodeDescription
from dist_ft.storage.documents import read_json_object
from dist_ft.storage.filesystem import Store

log = logging.getLogger("dist_ft.network")
FILE = "network.json"
NODE = "DIST_FT_NODE"
"""Environment variable by which a supervisor gives its process the name of the node."""
SLOW_FACTOR = 2.0
"""A pair this many times slower than the fastest quarter of pairs is slow."""


class NetworkDocument(TypedDict):
    """The content of network.json: the fields of `NetworkReport`."""

    world_size: int
    nodes: list[str]
    machines: list[NodeDescription]
    sums: list[dict[str, float]]
    links: list[dict[str, float]]
    slow: list[str]
    seconds: float
    backend: str


class PublicNetwork(TypedDict):
    """What a report that others see says of the network: nodes are numbers."""

    world_size: int
    sums: list[dict[str, float]]
    links: list[dict[str, float]]
    slow: list[str]
    seconds: float
    backend: str
    num_nodes: int


@dataclass(frozen=True)
class NetworkReport:
    """The result of a network check; the fields are the keys of network.json.

    Attributes:
        world_size: number of workers.
        nodes: their names; links name nodes by their place here.
        machines: description of each node.
        sums: over all workers.
        links: between pairs of nodes.
        slow: a line for each slow node and slow pair.
        seconds: that the check took.
        backend: nccl or gloo.
    """

    world_size: int
    nodes: tuple[str, ...]
    machines: tuple[NodeDescription, ...]
    sums: tuple[Sum, ...] = ()
    links: tuple[Link, ...] = ()
    slow: tuple[str, ...] = ()
    seconds: float = 0.0
    backend: str = "gloo"


def configure_interfaces(config: RunConfig) -> None:
    """Set the environment variables of nccl and gloo as configured, before a process group exists.

    Raises ConfigError if this node does not have the interface.
    """
    cluster = config.cluster
    os.environ.update(cluster.network_variables)
    if cluster.network_interface is None:
        return

    # On each node, because nodes of one cluster may name their interfaces differently.
    interfaces = [name for _, name in socket.if_nameindex()]
    for name in cluster.network_interface.split(","):
        if name not in interfaces:
            raise ConfigError(
                [
                    f"cluster.network_interface={cluster.network_interface}: node {node_name()} "
                    f"has no interface {name}. It has {', '.join(interfaces)}. Name one that all "
                    "nodes have."
                ],
                "network",
            )

    # "=" requests an exact match; without it NCCL matches by prefix
    os.environ["NCCL_SOCKET_IFNAME"] = f"={cluster.network_interface}"
    os.environ["GLOO_SOCKET_IFNAME"] = cluster.network_interface


def node_name() -> str:
    """Return the name of this node, as the supervisor knows it."""
    return os.environ.get(NODE) or socket.gethostname()


def check(
    config: RunConfig, world: World, collectives: Collectives, store: Store, previous_end: str = ""
) -> None:
    """Check the network if the config says so, store and log the result; a collective call.

    After a failure (`previous_end`) the nodes of the previous start are not checked again, because
    that restart should be fast. Raises WorkerError if a sum or received bytes are wrong.
    """
    mode = config.cluster.network_check
    if mode == "off" or (world.num_ranks == 1 and mode == "auto"):
        return

    # Gathered, so that all ranks decide from the same values: a rank that returned alone would
    # leave the others in the next collective call.
    names = collectives.all_gather(node_name())
    ranks_of_node = collectives.all_gather(world.rank_of_node)
    leaders = [rank for rank, rank_of_node in enumerate(ranks_of_node) if rank_of_node == 0]
    nodes = tuple(names[rank] for rank in leaders)
    if mode == "auto" and len(leaders) == 1:
        return

    # Only rank 0 reads the stored report, so its decision is broadcast.
    is_restart = world.rank == 0 and bool(previous_end)
    if collectives.broadcast(is_restart and stored_nodes(store) == nodes):
        return

    report = measure(config, world, collectives, leaders, nodes)
    if world.rank == 0:
        _log_report(report)
        _store_report(report, store)


def measure(
    config: RunConfig,
    world: World,
    collectives: Collectives,
    leaders: Sequence[int],
    nodes: tuple[str, ...],
) -> NetworkReport:
    """Return the speeds between workers; `leaders`: the first rank of each node.

    A collective call.
    """
    import torch

    start_s = time.monotonic()
    uses_gpu = config.cluster.gpus_per_worker > 0
    kind = "cuda" if uses_gpu else "cpu"
    device = torch.device(kind)

    is_leader = world.rank in leaders
    own_machine = machine.describe(uses_gpu) if is_leader else None
    machines = collectives.all_gather(own_machine)

    sums = SumMeasurement()
    if world.num_ranks > 1:
        sums = measure_sums(world, collectives, device, SUM_BYTES[kind])

    links = LinkMeasurement()
    if len(leaders) > 1:
        links = measure_links(world, collectives, device, leaders, PAIR_BYTES[kind])

    # All ranks raise or none does: one that continued alone would wait for the others.
    raise_together(collectives, _corruption_error(sums, links, nodes))

    return NetworkReport(
        world_size=world.num_ranks,
        nodes=nodes,
        machines=tuple(description for description in machines if description is not None),
        sums=sums.sums,
        links=links.links,
        slow=tuple(find_slow_links(links.links, nodes, config.cluster.network_min_mb_s)),
        seconds=round(time.monotonic() - start_s, 3),
        backend="nccl" if uses_gpu else "gloo",
    )


def _corruption_error(
    sums: SumMeasurement, links: LinkMeasurement, nodes: Sequence[str]
) -> WorkerError | None:
    """Return the error if a sum or received bytes are wrong."""
    # Pairs first: they name the nodes, and may be the reason why a sum is wrong.
    if links.corrupt_pairs:
        pairs = [
            f"between node {nodes[one]} and node {nodes[other]}"
            for one, other in links.corrupt_pairs
        ]
        problem = f"other bytes arrive than were sent {'; '.join(pairs)}"
    elif not sums.is_correct:
        problem = "a sum over all workers is wrong"
    else:
        return None

    return WorkerError(
        f"network check: {problem}. Training would be silently wrong. Remove these nodes, and "
        "check their GPUs, network cards and NCCL version. cluster.network_check=off trains "
        "without the check."
    )


def find_slow_links(
    links: Sequence[Link], nodes: Sequence[str], min_mb_s: float = 0.0
) -> list[str]:
    """Return a line for each node that is slow to most others, and for each further slow pair.

    Pure.
    """
    if not links:
        return []

    # The first quartile, not the median: with several slow nodes most pairs are slow ones.
    by_speed = sorted((link.mb_s for link in links), reverse=True)
    usual_mb_s = by_speed[len(links) // 4]
    slow = [link for link in links if link.mb_s * SLOW_FACTOR < usual_mb_s or link.mb_s < min_mb_s]

    # A node that is slow to most others is the cause of its slow pairs: one line for all of them.
    # Of two nodes neither can be called the slow one.
    lines, slow_nodes = [], set()
    for number, name in enumerate(nodes):
        num_links = sum(number in (link.one, link.other) for link in links)
        own_slow = [link for link in slow if number in (link.one, link.other)]
        if len(nodes) > 2 and 2 * len(own_slow) > num_links:
            slow_nodes.add(number)
            slowest_mb_s = min(link.mb_s for link in own_slow)
            lines.append(
                f"node {name} is slow to {len(own_slow)} of {num_links} other nodes: "
                f"{slowest_mb_s:,.0f} MB/s (usual here: {usual_mb_s:,.0f})"
            )

    for link in slow:
        if slow_nodes & {link.one, link.other}:
            continue

        expected = f"usual here: {usual_mb_s:,.0f}"
        if link.mb_s < min_mb_s:
            expected += f", required: {min_mb_s:,.0f}"
        lines.append(
            f"nodes {nodes[link.one]} and {nodes[link.other]}: {link.mb_s:,.0f} MB/s each way "
            f"({expected})"
        )
    return lines


def stored_nodes(store: Store) -> tuple[str, ...] | None:
    """Return the nodes of the last check; None if there was none, or if it cannot be read."""
    try:
        if not store.exists(FILE):
            return None
        return tuple(read_json_object(store, FILE)["nodes"])
    except (ValueError, KeyError, TypeError, StorageError):
        # An unreadable report only costs another check.
        return None


def _log_report(report: NetworkReport) -> None:
    if report.sums:
        largest = report.sums[-1]
        links = ""
        if report.links:
            speeds = [link.mb_s for link in report.links]
            links = (
                f"; {len(speeds)} pairs of nodes, {min(speeds):,.0f} to {max(speeds):,.0f} MB/s "
                "each way"
            )

        log.info(
            "network: a sum of %g MiB over %d workers takes %.1f ms (%s MB/s)%s; checked in %.1f s",
            largest.num_bytes / 2**20,
            report.world_size,
            1000 * largest.seconds,
            f"{largest.mb_s:,.0f}",
            links,
            report.seconds,
        )

    for line in report.slow:
        log.warning("network: %s; every step waits for it", line)


def _store_report(report: NetworkReport, store: Store) -> None:
    try:
        store.write(FILE, (json.dumps(asdict(report), indent=1) + "\n").encode())
    except StorageError as error:
        # The report is for people and for faster restarts; a run does not need it.
        log.warning("network: the result is not stored: %s", error)
