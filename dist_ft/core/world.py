"""Who am I among how many, and the small messages all ranks exchange.

`World` is a value. `Collectives` carries control messages (counts, decisions, small objects) over a gloo group of its
own, on CPU tensors, whatever device the model trains on; bulk tensors are the engine's business. What one rank
computes alone and acts on must go through here first, or others wait for ever.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from typing_extensions import override

from dist_ft.core.errors import ConfigError, DistFtError, PeerError

T = TypeVar("T")
VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class World:
    """This process among its peers: `rank` of `size`, and its place on its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """Read the variables that torchrun and Ray Train set; without them, a world of one."""
        try:
            rank, size, local_rank, local_size = (
                int(os.environ.get(name, default)) for name, default in VARIABLES
            )
        except ValueError as error:
            rank, size, local_rank, local_size, said = 0, 0, 0, 0, str(error)
        else:
            said = f"rank {rank} of {size}, {local_rank} of {local_size} on this node"
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
            raise ConfigError(
                [
                    f"RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE: do not make a world ({said}); what "
                    "torchrun sets is allowed; unset them to run alone"
                ],
                "environment",
            )
        return cls(rank, size, local_rank, local_size)

    def share(self, count: int) -> range:
        """Return the contiguous part of `range(count)` that is this rank's; parts differ by at most one."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def largest_share(self, count: int) -> int:
        """Return how many items the rank with most of `count` has."""
        return -(-count // self.size)


class Collectives:
    """Control messages in a world of one: every result is one's own value."""

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sum over all ranks, in float64."""
        return [float(value) for value in values]

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's `value`, by rank."""
        return [value]

    def gather(self, value: Any) -> list[Any] | None:
        """Return every rank's `value` on rank 0 and None elsewhere."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` on every rank."""
        return value

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self) -> None:
        """Release what the group holds."""


def on_rank0(world: World, collectives: Collectives, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on all ranks; its DistFtError is raised on all ranks.

    Any other exception is a bug: rank 0 raises it as it is, the others a PeerError, so that none waits.
    """
    result: Any = None
    error: DistFtError | None = None
    bug: Exception | None = None
    if world.rank == 0:
        try:
            result = action()
        except DistFtError as problem:
            error = problem
        except Exception as problem:
            bug, error = (
                problem,
                PeerError(
                    f"rank 0 failed ({type(problem).__name__}: {problem}); see its own error"
                ),
            )
    result, error = collectives.broadcast((result, error))
    if bug is not None:
        raise bug
    if error is not None:
        raise error
    return result


def raise_together(collectives: Collectives, error: DistFtError | None) -> None:
    """Raise on all ranks the error of the first rank that has one; a collective call."""
    for problem in collectives.all_gather(error):
        if problem is not None:
            raise problem


class GlooCollectives(Collectives):
    """Control messages over an own gloo group, beside whatever group the model uses."""

    def __init__(self, world: World, timeout_s: float) -> None:
        import torch.distributed as dist

        self._world = world
        self._dist = dist
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    @override
    def sum(self, values: Sequence[float]) -> list[float]:
        import torch

        tensor = torch.tensor(list(values), dtype=torch.float64)
        self._dist.all_reduce(tensor, group=self._group)
        return tensor.tolist()

    @override
    def all_gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self._world.size
        self._dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    @override
    def gather(self, value: Any) -> list[Any] | None:
        gathered: list[Any] | None = [None] * self._world.size if self._world.rank == 0 else None
        self._dist.gather_object(value, gathered, dst=0, group=self._group)
        return gathered

    @override
    def broadcast(self, value: Any) -> Any:
        box = [value]
        self._dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    @override
    def barrier(self) -> None:
        self._dist.barrier(group=self._group)

    @override
    def close(self) -> None:
        self._dist.destroy_process_group(self._group)


def collectives(world: World, timeout_s: float = 1800) -> Collectives:
    """Return the control channel of `world`; torch.distributed must be initialised when `world.size` > 1."""
    return GlooCollectives(world, timeout_s) if world.size > 1 else Collectives()
