"""Measures the network: sums over all workers, and exchanges between pairs of nodes.

Sums hold small integers, so a correct sum is exact. Pairs of nodes exchange in rounds in which no
node has two partners (a round-robin tournament), so no pair disturbs another. Guarantees: every
worker makes the same calls. Links within a node are not measured.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_ft.core.world import Collectives, World

MAX_ROUNDS = 31
"""Covers all pairs of up to 32 nodes.

With more nodes each meets 31 others, which is enough to find a slow node.
"""
NUM_TRIES = 3
"""The best of several counts: noise only ever makes a try slower."""
SUM_BYTES = {"cpu": (2**16, 2**22), "cuda": (2**20, 2**28)}
"""Bytes of the sums: a small one, timed for latency, and a large one, timed for bandwidth."""
PAIR_BYTES = {"cpu": 2**21, "cuda": 2**26}

Pair = tuple[int, int]
"""Two nodes by number, the lower one first."""


@dataclass(frozen=True)
class Sum:
    """A sum over all workers.

    Attributes:
        num_bytes: bytes that each worker adds.
        seconds: best time.
        mb_s: MB/s a worker sends, as the bus bandwidth of nccl-tests.
    """

    num_bytes: int
    seconds: float
    mb_s: float


@dataclass(frozen=True)
class Link:
    """Two nodes (by number), and the MB/s each way when both send to the other at once."""

    one: int
    other: int
    mb_s: float


@dataclass(frozen=True)
class SumMeasurement:
    """The sums that were timed, and whether every worker got the exact result of each."""

    sums: tuple[Sum, ...] = ()
    is_correct: bool = True


@dataclass(frozen=True)
class LinkMeasurement:
    """The pairs of nodes that were timed, and those between which bytes changed."""

    links: tuple[Link, ...] = ()
    corrupt_pairs: tuple[Pair, ...] = ()


@dataclass(frozen=True)
class _Exchange:
    """The best time of an exchange, and whether the bytes that arrived are those that were sent."""

    seconds: float
    is_correct: bool


def measure_sums(
    world: World, collectives: Collectives, device: Any, sizes: Sequence[int]
) -> SumMeasurement:
    """Time sums of `sizes` bytes over all workers; a collective call."""
    import torch
    import torch.distributed as dist

    num_ranks = world.num_ranks
    sums = []
    is_correct = True
    for num_bytes in sizes:
        # (N,) small integers: float32 sums stay exact up to 10^5 workers
        values = (torch.arange(num_bytes // 4, device=device) % 7).float()
        total_factor = sum(_factor(rank) for rank in range(num_ranks))
        expected = values * total_factor

        times = []
        for _ in range(NUM_TRIES):
            own = values * _factor(world.rank)

            # All start together, and the clock stops only when the GPU is done: kernels are
            # queued, so that `all_reduce` returns earlier.
            collectives.barrier()
            _synchronize(device)
            start_s = time.perf_counter()
            dist.all_reduce(own)
            _synchronize(device)
            times.append(time.perf_counter() - start_s)

            is_correct &= torch.equal(own, expected)

        # the slowest rank of each try, and the best try
        times_by_rank = collectives.all_gather(times)  # (ranks, tries)
        seconds = min(map(max, zip(*times_by_rank, strict=True)))

        # What a ring sends from each rank: (n - 1) / n of the bytes to sum, as many to distribute.
        sent_bytes = 2 * (num_ranks - 1) / num_ranks * num_bytes
        sums.append(Sum(num_bytes, seconds, sent_bytes / seconds / 1e6))

    is_correct_everywhere = all(collectives.all_gather(is_correct))
    return SumMeasurement(tuple(sums), is_correct_everywhere)


def _factor(rank: int) -> int:
    """Return the factor of a rank's values, so that ranks differ."""
    return 1 + rank % 16


def measure_links(
    world: World, collectives: Collectives, device: Any, leaders: Sequence[int], num_bytes: int
) -> LinkMeasurement:
    """Time exchanges of `num_bytes` between pairs of nodes; a collective call.

    `leaders`: the first rank of each node.
    """
    # Ranks that lead no node measure nothing, but join every barrier.
    own_node = leaders.index(world.rank) if world.rank in leaders else None

    measured: list[tuple[Link, bool]] = []
    for pairs in tournament_rounds(len(leaders))[:MAX_ROUNDS]:
        own_pair = next((pair for pair in pairs if own_node in pair), None)
        if own_node is not None and own_pair is not None:
            first, second = own_pair
            partner = second if first == own_node else first
            exchange = _exchange(leaders[own_node], leaders[partner], device, num_bytes)
            link = Link(first, second, num_bytes / exchange.seconds / 1e6)
            measured.append((link, exchange.is_correct))

        # No round starts before the last is over: a node exchanges with one partner at a time.
        collectives.barrier()

    # both ends report a link; the slower value counts
    slowest: dict[Pair, float] = {}
    corrupt: set[Pair] = set()
    for own in collectives.all_gather(measured):
        for link, is_correct in own:
            pair = link.one, link.other
            slowest[pair] = min(link.mb_s, slowest.get(pair, link.mb_s))
            if not is_correct:
                corrupt.add(pair)

    links = tuple(Link(*pair, mb_s) for pair, mb_s in sorted(slowest.items()))
    return LinkMeasurement(links, tuple(sorted(corrupt)))


def _exchange(own: int, other: int, device: Any, num_bytes: int) -> _Exchange:
    """Send to and receive from another rank at once."""
    import torch
    import torch.distributed as dist

    # (N,) The sender's rank is part of the pattern: bytes of any other rank would differ.
    pattern = torch.arange(num_bytes // 4, device=device, dtype=torch.int32)
    sent = pattern + own
    received = torch.empty_like(pattern)

    times = []
    for _ in range(NUM_TRIES):
        _synchronize(device)
        start_s = time.perf_counter()

        # In one batch: NCCL runs single operations in order, and with both sends first it would
        # wait forever.
        operations = [
            dist.P2POp(dist.isend, sent, other),
            dist.P2POp(dist.irecv, received, other),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        _synchronize(device)
        times.append(time.perf_counter() - start_s)

    # the first try also connects
    return _Exchange(min(times[1:]), bool(torch.equal(received, pattern + other)))


def _synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def tournament_rounds(count: int) -> list[list[Pair]]:
    """Return all pairs of `count` players in rounds; in a round each plays at most once. Pure.

    By the circle method.
    """
    players: list[int] = list(range(count))
    if count % 2:
        players.append(-1)  # whoever meets it has a rest

    rounds = []
    for _ in range(len(players) - 1):
        # The first half faces the second one, back to front.
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        rounds.append(sorted((min(pair), max(pair)) for pair in pairs if -1 not in pair))

        # The first player stays, all others move on by one seat.
        players = [players[0], players[-1], *players[1:-1]]

    return rounds
