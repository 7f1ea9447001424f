"""This process's place among all ranks, and the small messages that ranks exchange.

`World` is a value. `Collectives` carries control messages (counts, decisions, small objects) over
its own gloo group, on CPU tensors, whatever device the model trains on; the engine moves bulk
tensors. A decision that one rank makes alone must be broadcast here before any rank acts on it, or
the others wait forever.
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
"""Environment variables of `World.from_environment`, and their defaults."""


@dataclass(frozen=True)
class World:
    """This process among all ranks, and its place on its node.

    Attributes:
        rank: rank of this process, from 0 to `num_ranks` - 1.
        num_ranks: processes of the run.
        rank_of_node: index of this process among those of its node (torch's LOCAL_RANK).
        ranks_per_node: processes on this node (torch's LOCAL_WORLD_SIZE).
    """

    rank: int = 0
    num_ranks: int = 1
    rank_of_node: int = 0
    ranks_per_node: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """Read the variables that torchrun and Ray Train set; without them, a world of one.

        Raises:
            ConfigError: the variables contradict each other.
        """
        texts = {name: os.environ.get(name, default) for name, default in VARIABLES}

        try:
            world = cls(*(int(text) for text in texts.values()))
        except ValueError as error:
            raise _invalid_environment(str(error)) from None

        # Otherwise a wrong number would only show as a rendezvous that times out.
        rank_is_valid = 0 <= world.rank < world.num_ranks
        node_is_valid = 0 <= world.rank_of_node < world.ranks_per_node <= world.num_ranks
        if not (rank_is_valid and node_is_valid):
            raise _invalid_environment(
                f"rank {world.rank} of {world.num_ranks}, "
                f"{world.rank_of_node} of {world.ranks_per_node} on this node"
            )
        return world

    def share(self, count: int) -> range:
        """Return this rank's contiguous part of `range(count)`; parts differ by at most one."""
        # Not count // num_ranks for each, which would leave the whole remainder to one rank.
        start = self.rank * count // self.num_ranks
        stop = (self.rank + 1) * count // self.num_ranks
        return range(start, stop)

    def largest_share(self, count: int) -> int:
        """Return the length of the longest part that any rank has of `range(count)`."""
        return -(-count // self.num_ranks)


def _invalid_environment(what: str) -> ConfigError:
    return ConfigError(
        [
            f"RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE: inconsistent ({what}). Allowed: the "
            "values that torchrun sets. Unset them to run alone."
        ],
        "environment",
    )


class Collectives:
    """Control messages in a world of one: every result is this rank's own value."""

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
        """Release the resources of the group."""


def on_rank0(world: World, collectives: Collectives, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on all ranks; a collective call.

    Raises:
        DistFtError: `action` raised it on rank 0; all ranks raise it.
        Exception: any other error of `action` is a bug. Rank 0 raises it unchanged, the others
            raise a PeerError, so that no rank waits.
    """
    result: Any = None
    error: DistFtError | None = None
    bug: Exception | None = None
    if world.rank == 0:
        try:
            result = action()
        except DistFtError as caught:
            error = caught
        except Exception as caught:
            # Not sent itself: an arbitrary exception may not survive pickling.
            bug = caught
            error = PeerError(
                f"rank 0 failed ({type(caught).__name__}: {caught}). See its own error."
            )

    # Rank 0 gets here after a failure too; without this message the others would wait for it.
    result, error = collectives.broadcast((result, error))
    if bug is not None:
        raise bug
    if error is not None:
        raise error
    return result


def raise_together(collectives: Collectives, error: DistFtError | None) -> None:
    """Raise on all ranks the error of the first rank that has one; a collective call."""
    # All ranks raise the same error, so that they agree on what happens next.
    for error_of_rank in collectives.all_gather(error):
        if error_of_rank is not None:
            raise error_of_rank


class GlooCollectives(Collectives):
    """Control messages over their own gloo group, separate from the group of the model."""

    def __init__(self, world: World, timeout_s: float) -> None:
        import torch.distributed as dist

        self._world = world
        self._dist = dist
        # A collective call too: all ranks must create their groups in the same order.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    @override
    def sum(self, values: Sequence[float]) -> list[float]:
        import torch

        # float64 counts exactly up to 2**53; a run has more tokens than the 2**24 of float32.
        tensor = torch.tensor(list(values), dtype=torch.float64)
        self._dist.all_reduce(tensor, group=self._group)
        return tensor.tolist()

    @override
    def all_gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self._world.num_ranks
        self._dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    @override
    def gather(self, value: Any) -> list[Any] | None:
        # torch requires None on the ranks that receive nothing.
        gathered: list[Any] | None = None
        if self._world.rank == 0:
            gathered = [None] * self._world.num_ranks

        self._dist.gather_object(value, gathered, dst=0, group=self._group)
        return gathered

    @override
    def broadcast(self, value: Any) -> Any:
        # torch replaces the items of a list in place, and returns nothing.
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
    """Return the control channel of `world`.

    With more than one rank torch.distributed must be initialized.
    """
    if world.num_ranks > 1:
        return GlooCollectives(world, timeout_s)
    return Collectives()
