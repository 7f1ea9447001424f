"""The interface of all engines: train a step, compute a loss, and access the named state.

An engine exposes its state as `StateSlice`s: which elements of which parameter this worker holds,
with functions to read and write them. Saving, loading, resharding and checking weights all use the
same slices, so an engine describes its layout only once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from dist_ft.data.batch import Batch, empty_batch
from dist_ft.model.adapters.adalora import RankSchedule


@dataclass(frozen=True)
class StateSlice:
    """Elements [offset, offset + numel) of a flattened state of a parameter, held by this worker.

    Attributes:
        name: name of the parameter.
        key: "param" (float32 master), "frozen", "buffer", or an optimizer state such as "exp_avg".
        owned: whether this worker saves it. Replicated state is saved by one worker and loaded by
            all.
        read: returns the values (numel,), on any device.
        write: stores new values (numel,), given as float32 on the CPU.
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
    """The result of one training step on this worker.

    Attributes:
        loss_sum: summed loss of this worker's lanes.
        grad_norm: global gradient norm before clipping, the same on all workers.
    """

    loss_sum: float
    grad_norm: float


class LossAndOutputs(NamedTuple):
    """The loss of a batch and the outputs of the model's head.

    Attributes:
        loss_sum: summed loss.
        outputs: float32, the first dimension is the rows of the batch.
    """

    loss_sum: float
    outputs: np.ndarray


class GenerationModel(NamedTuple):
    """A transformers model that is ready to generate.

    Attributes:
        is_collective: whether all workers must call the model's forward equally often (ZeRO-3); see
            `synced_gpus` of `generate`.
    """

    model: Any
    is_collective: bool


class PaddedLanes(NamedTuple):
    """One worker's lanes: a batch and a seed for each."""

    batches: list[Batch]
    seeds: list[int]


class Engine(ABC):
    """A trainable model, replicated or sharded over the workers."""

    device: torch.device

    step = 0
    """The current training step, from 1.

    The training loop sets it; AdaLoRA's ranks depend on it.
    """

    def _update_ranks_after_steps(
        self, rank_schedule: RankSchedule | None, optimizer: torch.optim.Optimizer
    ) -> None:
        """Let the rank schedule of the model, if it has one, update after each optimizer step."""
        if rank_schedule is None:
            return

        def update_ranks(*_: Any) -> None:
            # The gradients still exist here: engines clear them only after the optimizer's step.
            # A skipped update does not reach this hook, so the ranks stay as they are.
            rank_schedule.after_update(self.step)

        optimizer.register_step_post_hook(update_ranks)

    @abstractmethod
    def accumulate(
        self, batches: Sequence[Batch], seeds: Sequence[int], num_target_tokens: int
    ) -> float:
        """Do forward and backward for each batch; return the summed loss of this worker's lanes.

        Args:
            batches: this worker's lanes; the same number on every worker (`pad_to_equal_lanes`).
            seeds: one seed per lane, for randomness in the model.
            num_target_tokens: target tokens of the whole global batch, by which the summed loss is
                divided.
        """

    @abstractmethod
    def update(
        self,
        learning_rate: float,
        grad_norm_limit: float = math.inf,
        depth_scale: Callable[[int], float] | None = None,
    ) -> float:
        """Do one optimizer step with the accumulated gradient; return the norm before clipping.

        The norm is that of the whole gradient, the same on all workers. If it is not finite or
        above the limit, the update is skipped: weights and optimizer state stay unchanged, and the
        gradient is discarded.

        Args:
            learning_rate: learning rate of this step.
            grad_norm_limit: largest norm before clipping at which the update is done.
            depth_scale: multiplies the learning rate of weights at a depth; only for engines with
                `group_by_depth`.
        """

    def train_step(
        self,
        batches: Sequence[Batch],
        seeds: Sequence[int],
        num_target_tokens: int,
        learning_rate: float,
    ) -> StepOutcome:
        """Do forward and backward for each batch and one optimizer step.

        Arguments as for `accumulate` and `update`.
        """
        loss_sum = self.accumulate(batches, seeds, num_target_tokens)
        grad_norm = self.update(learning_rate)
        return StepOutcome(loss_sum, grad_norm)

    @abstractmethod
    def loss_sum(self, batch: Batch) -> float:
        """Return the summed loss of `batch` with dropout off. A collective call under ZeRO-3."""

    @abstractmethod
    def loss_and_outputs(self, batch: Batch) -> LossAndOutputs:
        """Return the summed loss of `batch` and the outputs of a model with a head, dropout off.

        A collective call under ZeRO-3.
        """

    @abstractmethod
    def generation_mode(self) -> AbstractContextManager[GenerationModel]:
        """Return a context in which the transformers model is ready to generate."""

    @abstractmethod
    def accumulate_fisher(self, batch: Batch) -> None:
        """Add the squared gradient of the summed loss, over all workers, to the Fisher information.

        Without dropout, clipping or an update. A collective call: all workers but one pass a batch
        without targets.
        """

    @abstractmethod
    def scale_fisher(self, factor: float) -> None:
        """Multiply the Fisher information, after all squared gradients were added."""

    @abstractmethod
    def swap_average(self) -> None:
        """Swap the weights with their moving average.

        A second call undoes it. A collective call.
        """

    @abstractmethod
    def state_slices(self) -> Iterator[StateSlice]:
        """Iterate over all state of this worker; optimizer state exists from the start."""

    @abstractmethod
    def frozen_parameters(self) -> frozenset[str]:
        """Return the names of the parameters that are not trained; the same on all workers."""

    @abstractmethod
    def optimizer_step(self) -> int:
        """Return the number of updates the optimizer has counted; 0 if it has no count (SGD)."""

    @abstractmethod
    def finish_load(self, optimizer_step: int) -> None:
        """Update working copies after state slices were written. A collective call."""

    def close(self) -> None:  # noqa: B027 - most engines hold no resources
        """Release the engine's resources."""


def pad_to_equal_lanes(
    batches: Sequence[Batch], seeds: Sequence[int], num_lanes: int
) -> PaddedLanes:
    """Add empty batches up to `num_lanes`, so that all workers do the same number of passes."""
    padded = PaddedLanes(list(batches), list(seeds))

    # Passes are collective calls under ZeRO; a worker with fewer lanes would leave the others
    # waiting. An empty batch has no targets, so it adds zero to the loss and the gradient.
    for _ in range(num_lanes - len(batches)):
        padded.batches.append(empty_batch())
        padded.seeds.append(0)
    return padded


def seed_random(seed: int, device: torch.device) -> None:
    """Seed the random generators of `device` and the CPU, as `torch.manual_seed` does.

    `torch.manual_seed` also formats a stack trace for each absent kind of accelerator, which takes
    more than a millisecond per call.
    """
    torch.default_generator.manual_seed(seed)

    # On GPUs dropout draws from the generator of the device, not from that of the CPU.
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
