"""Names the worker all others wait for.

In a synchronous step every worker takes as long as the slowest, so step times tell nothing. Three things a worker knows
of itself do: how long it stood still (stopped, starved of CPU: a thread that sleeps in short naps and looks how long
each was), how long it waited for data, and how long a small matrix product takes on its device. Compared over all
workers every `log.straggler_steps` steps. A slow one is named, not killed.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from dataclasses import dataclass
from statistics import median

import torch

from dist_ft.core.world import Collectives, World

log = logging.getLogger("dist_ft.train")
NAP_S, LATE_S = 0.05, 0.05
"""A nap that took this much longer than asked for was no ordinary scheduling."""
STOOD_SHARE, TIMES_SLOWER = 0.2, 1.5
MOST_LISTED = 16


@dataclass(frozen=True)
class Pace:
    """What a worker tells of itself: shares of the time since the last look, and seconds of one probe."""

    rank: int
    node: str
    stood_share: float
    data_share: float
    probe_s: float


class StragglerDetector:
    """One worker's part."""

    def __init__(
        self, world: World, collectives: Collectives, device: torch.device, every_steps: int
    ) -> None:
        """Begin to watch if `every_steps` is not 0 and there is someone to compare with."""
        self._world = world
        self._collectives = collectives
        self._device = device
        self._every_steps = every_steps if world.num_ranks > 1 else 0
        self._node = socket.gethostname()
        self._stood_s = self._data_s = 0.0
        self._since = time.monotonic()
        self._ended = threading.Event()
        self._named: set[int] = set()
        if self._every_steps:
            threading.Thread(target=self._nap, name="stragglers", daemon=True).start()

    def after_step(self, step: int, waited_s: float) -> dict[str, float]:
        """Note a step and how long it waited for data; now and then compare (a collective call) and return metrics."""
        self._data_s += waited_s
        if not self._every_steps or step % self._every_steps:
            return {}
        now = time.monotonic()
        passed_s = max(now - self._since, 1e-9)
        own = Pace(
            self._world.rank,
            self._node,
            self._stood_s / passed_s,
            self._data_s / passed_s,
            probe(self._device),
        )
        self._stood_s = self._data_s = 0.0
        self._since = time.monotonic()
        paces = self._collectives.gather(own)
        return self._tell(step, paces) if paces is not None else {}

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()

    def _nap(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(NAP_S):
            now = time.monotonic()
            late_s = now - before - NAP_S
            if late_s > LATE_S:
                self._stood_s += late_s
            before = now

    def _tell(self, step: int, paces: list[Pace]) -> dict[str, float]:
        """Log who has become slow, or no longer is, and return the metrics."""
        slow = judge(paces)
        for rank in sorted(slow.keys() - self._named):
            log.warning(
                "step %d: worker %d on node %s is slow: %s; all others wait for it",
                step,
                rank,
                paces[rank].node,
                slow[rank],
            )
        for rank in sorted(self._named - slow.keys()):
            log.warning(
                "step %d: worker %d on node %s is no longer slow", step, rank, paces[rank].node
            )
        self._named = set(slow)
        paces = sorted(
            paces,
            key=lambda pace: (pace.rank in slow, pace.stood_share, pace.probe_s),
            reverse=True,
        )
        return {
            f"{name}/{pace.node}/rank-{pace.rank:05d}": value
            for pace in paces[:MOST_LISTED]
            for name, value in (
                ("stood_share", pace.stood_share),
                ("data_share", pace.data_share),
                ("probe_s", pace.probe_s),
            )
        }


def judge(paces: list[Pace]) -> dict[int, str]:
    """Return what is slow about each slow worker, by rank. Pure."""
    usual = {
        name: median(getattr(pace, name) for pace in paces)
        for name in ("stood_share", "data_share", "probe_s")
    }
    if len(paces) == 2:  # of two, the median would be half the slow one's
        usual = {name: min(getattr(pace, name) for pace in paces) for name in usual}
    found = {}
    for pace in paces:
        said = [
            f"it {what} {getattr(pace, name):.0%} of the time (usual here: {usual[name]:.0%})"
            for name, what in (
                ("stood_share", "stood still (stopped, or without a CPU)"),
                ("data_share", "waited for data"),
            )
            if getattr(pace, name) > usual[name] + STOOD_SHARE
        ]
        if pace.probe_s > TIMES_SLOWER * usual["probe_s"] and not said:
            said = [
                f"a matrix product takes it {pace.probe_s / usual['probe_s']:.1f} times as long as usual here"
            ]
        if said:
            found[pace.rank] = "; ".join(said)
    return found


def probe(device: torch.device, size: int = 256) -> float:
    """Return the seconds of a small matrix product on `device`: the best of five."""
    values = torch.ones(size, size, device=device)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        float((values @ values)[0, 0])  # waits for the device
        times.append(time.perf_counter() - begun)
    return min(times)


def gpu_memory(device: torch.device) -> dict[str, float]:
    """Return {gpu_memory_gib: the most this process has held on its GPU so far}; nothing without one."""
    if device.type != "cuda":
        return {}
    return {"gpu_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
