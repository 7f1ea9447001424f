"""Names the worker that all others wait for.

In a synchronous step every worker takes as long as the slowest, so step times do not show which one
is slow. A worker's own measurements do: how long it was stalled (stopped, or without a CPU: a
thread sleeps for short times and checks how long each sleep took), how long it waited for data, and
how long a small matrix product takes on its device. They are compared over all workers every
`log.straggler_steps` steps. A slow worker is named, not ended.
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
SLEEP_S = 0.05
LATE_S = 0.05
"""A sleep that took this much longer than `SLEEP_S` counts as a stall, not as normal scheduling."""
SHARE_MARGIN = 0.2
"""A share this much above the typical one is slow."""
SLOWDOWN = 1.5
"""A matrix product that takes this many times the typical one is slow."""
MAX_WORKERS_LOGGED = 16


@dataclass(frozen=True)
class Pace:
    """The measurements of a worker since the last comparison.

    Attributes:
        rank, node: of the worker.
        stalled_share, data_share: shares of the time, 0..1.
        probe_s: seconds of one small matrix product.
    """

    rank: int
    node: str
    stalled_share: float
    data_share: float
    probe_s: float


class StragglerDetector:
    """Measures the pace of this worker and compares it with the others."""

    def __init__(
        self, world: World, collectives: Collectives, device: torch.device, every_steps: int
    ) -> None:
        """Start measuring, unless `every_steps` is 0 or there is one worker."""
        self._world = world
        self._collectives = collectives
        self._device = device
        self._every_steps = every_steps if world.num_ranks > 1 else 0
        self._node = socket.gethostname()
        self._stalled_s = self._data_s = 0.0
        self._since_s = time.monotonic()
        self._stopped = threading.Event()
        self._slow_ranks: set[int] = set()
        if self._every_steps:
            threading.Thread(target=self._measure_stalls, name="stragglers", daemon=True).start()

    def after_step(self, step: int, waited_s: float) -> dict[str, float]:
        """Record a step and the time it waited for data; return metrics on rank 0 if any are due.

        Every `every_steps` steps this is a collective call.
        """
        self._data_s += waited_s
        if not self._every_steps or step % self._every_steps:
            return {}

        # Measured here, at a step that all workers have just ended: none competes with its own
        # training for the device.
        elapsed_s = max(time.monotonic() - self._since_s, 1e-9)
        own = Pace(
            self._world.rank,
            self._node,
            self._stalled_s / elapsed_s,
            self._data_s / elapsed_s,
            time_matrix_product(self._device),
        )
        self._stalled_s = self._data_s = 0.0
        self._since_s = time.monotonic()

        # Only rank 0 compares and logs.
        paces = self._collectives.gather(own)
        if paces is None:
            return {}
        return self._log_changes(step, paces)

    def close(self) -> None:
        """Stop measuring."""
        self._stopped.set()

    def _measure_stalls(self) -> None:
        # A process that is stopped, or gets no CPU, cannot see it itself; it can only notice that
        # more time has passed than it slept.
        before = time.monotonic()
        while not self._stopped.wait(SLEEP_S):
            now = time.monotonic()
            late_s = now - before - SLEEP_S
            if late_s > LATE_S:
                self._stalled_s += late_s
            before = now

    def _log_changes(self, step: int, paces: list[Pace]) -> dict[str, float]:
        """Log which workers became slow, or are no longer; return the metrics."""
        # Changes only: a worker that stays slow is not logged at each comparison.
        reasons = find_slow_workers(paces)
        for rank in sorted(reasons.keys() - self._slow_ranks):
            log.warning(
                "step %d: worker %d on node %s is slow: %s; all others wait for it",
                step,
                rank,
                paces[rank].node,
                reasons[rank],
            )

        for rank in sorted(self._slow_ranks - reasons.keys()):
            log.warning(
                "step %d: worker %d on node %s is no longer slow", step, rank, paces[rank].node
            )

        self._slow_ranks = set(reasons)

        # A line of metrics holds a limited number of workers, so those that matter come first.
        slowest_first = sorted(
            paces,
            key=lambda pace: (pace.rank in reasons, pace.stalled_share, pace.probe_s),
            reverse=True,
        )
        metrics = {}
        for pace in slowest_first[:MAX_WORKERS_LOGGED]:
            worker = f"{pace.node}/rank-{pace.rank:05d}"
            metrics[f"stalled_share/{worker}"] = pace.stalled_share
            metrics[f"data_share/{worker}"] = pace.data_share
            metrics[f"probe_s/{worker}"] = pace.probe_s

        return metrics


def find_slow_workers(paces: list[Pace]) -> dict[int, str]:
    """Return {rank: what is slow} of the slow workers. Pure."""
    # Of two workers, the median would be half the slow one's.
    typical = min if len(paces) == 2 else median
    typical_stalled = typical([pace.stalled_share for pace in paces])
    typical_data = typical([pace.data_share for pace in paces])
    typical_probe_s = typical([pace.probe_s for pace in paces])

    reasons = {}
    for pace in paces:
        reasons_of_worker = []
        for share, typical_share, what in (
            (pace.stalled_share, typical_stalled, "was stalled (stopped, or without a CPU)"),
            (pace.data_share, typical_data, "waited for data"),
        ):
            if share > typical_share + SHARE_MARGIN:
                reasons_of_worker.append(
                    f"it {what} {share:.0%} of the time (typical: {typical_share:.0%})"
                )

        # A worker that was stalled may be slow in the product too; the stall is then the reason.
        if not reasons_of_worker and pace.probe_s > SLOWDOWN * typical_probe_s:
            times = pace.probe_s / typical_probe_s
            reasons_of_worker.append(
                f"a matrix product takes it {times:.1f} times as long as is typical"
            )

        if reasons_of_worker:
            reasons[pace.rank] = "; ".join(reasons_of_worker)

    return reasons


def time_matrix_product(device: torch.device, size: int = 256) -> float:
    """Return the seconds of a small matrix product on `device`: the fastest of five."""
    # The fastest, because the first ones may include starting the device's library, and any of them
    # an interruption.
    values = torch.ones(size, size, device=device)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        float((values @ values)[0, 0])  # waits for the device
        times.append(time.perf_counter() - start)

    return min(times)


def gpu_memory_metrics(device: torch.device) -> dict[str, float]:
    """Return {gpu_memory_gib: the peak of this process on its GPU so far}; empty without a GPU."""
    if device.type != "cuda":
        return {}
    return {"gpu_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
