"""One interface for all engines: a step of learning, a loss, and the named state behind them.

State is exposed as `Slot`s: which part of which parameter this worker holds, readable and writable. Saving, loading,
resharding and checking of weights all go through the same slots, so an engine describes its layout once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dist_ft.data.batch import Batch, empty_batch
from dist_ft.model.adapters.adalora import RankSchedule


@dataclass(frozen=True)
class StateSlice:
    """Elements [offset, offset + numel) of state `key` of parameter `name`, flattened, as held by this worker.

    Attributes:
        key: "param" (float32 master), "frozen", "buffer", or an optimizer state such as "exp_avg".
        owned: whether this worker saves it (of replicated state only one worker does; all of them load it).
        read: returns the values, 1-D, on any device.
        write: takes the new values, 1-D float32 on the CPU.
    """

    name: str
    key: str
    offset: int
    numel: int
    owned: bool
    read: Callable[[], torch.Tensor]
    write: Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step saw on this worker.

    Attributes:
        loss_sum: summed loss of this worker's lanes.
        grad_norm: global gradient norm before clipping, the same on all workers.
    """

    loss_sum: float
    grad_norm: float


class Engine(ABC):
    """A model that learns, wherever its parts lie."""

    device: torch.device
    step = 0
    """The step under way, 1 the first; whoever trains tells it, for what follows from it (AdaLoRA's ranks)."""

    def _deal_ranks(self, rank_schedule: RankSchedule | None, optimizer: torch.optim.Optimizer) -> None:
        """Let `ranks`, if the model has any to deal, know of each update `optimizer` makes."""
        if rank_schedule is not None:
            optimizer.register_step_post_hook(lambda *_: rank_schedule.after_update(self.step))

    @abstractmethod
    def accumulate(
        self, batches: Sequence[Batch], seeds: Sequence[int], num_target_tokens: int
    ) -> float:
        """Do forward and backward for each batch and return the summed loss of this worker's lanes.

        Args:
            batches: this worker's lanes; the same number on every worker (`even_out`).
            seeds: one seed a lane for what is random in the model.
            num_target_tokens: of the whole global batch, which the summed loss is divided by.
        """

    @abstractmethod
    def update(
        self,
        learning_rate: float,
        grad_norm_limit: float = math.inf,
        of_depth: Callable[[int], float] | None = None,
    ) -> float:
        """Do one optimizer step with the gradient accumulated, if its norm allows; return that norm before clipping.

        `of_depth` multiplies the rate of weights at a depth, if the engine was made `by_depth`. The norm is that of the
        whole gradient, the same on all workers. Above `most_norm`, or where it is no finite number, nothing changes:
        neither weights nor optimizer state; the gradient is dropped.
        """

    def train_step(
        self,
        batches: Sequence[Batch],
        seeds: Sequence[int],
        num_target_tokens: int,
        learning_rate: float,
    ) -> StepOutcome:
        """Do forward and backward for each batch and one optimizer step (see `accumulate` and `update`)."""
        loss_sum = self.accumulate(batches, seeds, num_target_tokens)
        return StepOutcome(loss_sum, self.update(learning_rate))

    @abstractmethod
    def loss_sum(self, batch: Batch) -> float:
        """Return the summed loss of `batch` without learning (dropout off); a collective call under ZeRO-3."""

    @abstractmethod
    def loss_and_outputs(self, batch: Batch) -> tuple[float, np.ndarray]:
        """Return the summed loss of `batch`, and what a model with a head tells of each row (float32, rows first).

        Without learning, as `loss_sum`; a collective call under ZeRO-3.
        """

    @abstractmethod
    def generation_mode(self) -> AbstractContextManager[tuple[Any, bool]]:
        """Return a context with the transformers model itself, ready to make texts, and whether that is collective.

        If it is (ZeRO-3), every worker must call its forward as often, which `synced_gpus` of `generate` sees to.
        """

    @abstractmethod
    def accumulate_fisher(self, batch: Batch) -> None:
        """Add the squared gradient of the summed loss of `batch`, over all workers, to the Fisher information.

        Without dropout, clipping or learning; a collective call. All workers but one give a batch without targets.
        """

    @abstractmethod
    def scale_fisher(self, factor: float) -> None:
        """Multiply the Fisher information, once all squares are added."""

    @abstractmethod
    def swap_average(self) -> None:
        """Let the weights and their moving average change places; again, and all is as before; a collective call."""

    @abstractmethod
    def state_slices(self) -> Iterator[StateSlice]:
        """Iterate over all state this worker holds; optimizer state exists from the start."""

    @abstractmethod
    def frozen_parameters(self) -> frozenset[str]:
        """Return the names of the parameters that do not learn; the same on all workers."""

    @abstractmethod
    def optimizer_step(self) -> int:
        """Return how many updates the optimizer counts; 0 for one that does not count (SGD)."""

    @abstractmethod
    def finish_load(self, optimizer_step: int) -> None:
        """Bring working copies in line after slots were written; a collective call."""

    def close(self) -> None:  # noqa: B027 - most engines hold nothing
        """Release what the engine holds."""


def pad_to_equal_lanes(
    batches: Sequence[Batch], seeds: Sequence[int], count: int
) -> tuple[list[Batch], list[int]]:
    """Add empty batches up to `count`, so that every worker makes the same number of forward and backward calls."""
    missing = count - len(batches)
    return [*batches, *(empty_batch() for _ in range(missing))], [*seeds, *([0] * missing)]


def seed_random(seed: int, device: torch.device) -> None:
    """Seed what is random on `device` and on the CPU, as `torch.manual_seed` does.

    That one also formats a stack trace for each kind of accelerator that is absent: over a millisecond a call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
