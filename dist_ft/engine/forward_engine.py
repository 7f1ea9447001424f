"""An engine that only looks: no gradients, no optimizer state, no masters. For models that are scored, not trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from typing_extensions import override

from dist_ft.data.batch import Batch
from dist_ft.engine.torch_engine import TorchEngine
from dist_ft.model.trainable_model import TrainableModel, parameters_by_name


class ForwardEngine(TorchEngine):
    """The plain engine without learning: `loss_sum`, `told` and the weights' slots."""

    def __init__(self, module: TrainableModel, device: torch.device) -> None:
        """Take `module` to `device`; its weights are taken for frozen."""
        self.device = device
        self.module = module.to(device).eval().requires_grad_(False)
        self._parameters = parameters_by_name(module)
        self._learned, self._masters = {}, {}

    @override
    def accumulate(
        self, batches: Sequence[Batch], seeds: Sequence[int], num_target_tokens: int
    ) -> float:
        raise AssertionError("an engine that only looks was asked to learn")

    @override
    def update(
        self,
        learning_rate: float,
        grad_norm_limit: float = math.inf,
        of_depth: Callable[[int], float] | None = None,
    ) -> float:
        raise AssertionError("an engine that only looks was asked to learn")

    @override
    def optimizer_step(self) -> int:
        return 0

    @override
    def finish_load(self, optimizer_step: int) -> None:
        """Nothing is kept beside the weights."""
