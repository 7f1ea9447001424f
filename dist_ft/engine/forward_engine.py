"""An engine without gradients, optimizer state and masters, for models that are only evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from typing_extensions import override

from dist_ft.data.batch import Batch
from dist_ft.engine.torch_engine import TorchEngine
from dist_ft.model.trainable_model import TrainableModel, parameters_by_name


class ForwardEngine(TorchEngine):
    """The plain engine without training: losses, outputs, generation and the state slices."""

    def __init__(self, module: TrainableModel, device: torch.device) -> None:
        """Move `module` to `device` and freeze its weights."""
        self.device = device
        self.module = module.to(device).eval().requires_grad_(False)
        self._parameters = parameters_by_name(module)

        # Without masters every state slice of a weight is "frozen", and nothing is copied.
        self._trained = {}
        self._masters = {}

    @override
    def accumulate(
        self, batches: Sequence[Batch], seeds: Sequence[int], num_target_tokens: int
    ) -> float:
        raise AssertionError("a ForwardEngine cannot train")

    @override
    def update(
        self,
        learning_rate: float,
        grad_norm_limit: float = math.inf,
        depth_scale: Callable[[int], float] | None = None,
    ) -> float:
        raise AssertionError("a ForwardEngine cannot train")

    @override
    def optimizer_step(self) -> int:
        return 0

    @override
    def finish_load(self, optimizer_step: int) -> None:
        """There are no copies of the weights to update."""
