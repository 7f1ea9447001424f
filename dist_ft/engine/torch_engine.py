"""The plain engine: one process, PyTorch alone. It defines what the sharded engines must equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from dist_ft.config.schema import OptimizerSection
from dist_ft.data.batch import Batch
from dist_ft.engine import optimizers
from dist_ft.engine.base import Engine, Slot, seed_random
from dist_ft.engine.regularizers import Guards, add_squares, exchange, scale_squares
from dist_ft.model.adversarial import Adversary, learn_lane
from dist_ft.model.trainable_model import Inputs, Learner, canonical_names


def view_slot(name: str, key: str, tensor: torch.Tensor, owned: bool = True) -> Slot:
    """Return the slot of a whole tensor that lies in this process."""

    def write(values: torch.Tensor) -> None:
        with torch.no_grad():
            tensor.copy_(values.view(tensor.shape))

    return Slot(name, key, 0, tensor.numel(), owned, lambda: tensor.detach().reshape(-1), write)


class TorchEngine(Engine):
    """Forward, backward and update in this process, with float32 masters beside bfloat16 weights."""

    def __init__(
        self,
        module: Learner,
        section: OptimizerSection,
        device: torch.device,
        by_depth: bool = False,
        adversary: Adversary | None = None,
        guards: Guards | None = None,
    ) -> None:
        self.device = device
        self._adversary = adversary
        self._guards = guards or Guards()
        self.module = module.to(device).train()
        self._section = section
        self._parameters = canonical_names(module)
        self._learned = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self._masters = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for name, p in self._learned.items()
        }
        groups = optimizers.param_groups(
            self._masters,  # type: ignore[arg-type]
            section.weight_decay,
            by_depth,
            section.decay_exempt,
        )
        self.optimizer = optimizers.build(groups, section)
        optimizers.ensure_state(
            self.optimizer, section.name, section.momentum, self._masters.values()
        )
        self._deal_ranks(module.ranks, self.optimizer)
        self._guards.ensure(self.optimizer, self._masters.values())

    @override
    def accumulate(
        self, batches: Sequence[Batch], seeds: Sequence[int], num_target_tokens: int
    ) -> float:
        loss_sum = torch.zeros((), device=self.device)
        for batch, seed in zip(batches, seeds, strict=True):
            inputs = self.module.inputs(batch, self.device)

            def forward(inputs: Inputs = inputs, seed: int = seed) -> torch.Tensor:
                seed_random(seed, self.device)
                return self.module(**inputs)

            def backward(loss: torch.Tensor, weight: float = 1.0, last: bool = True) -> None:
                (loss * weight / num_target_tokens).backward()
                self._collect()

            loss_sum += learn_lane(self._adversary, forward, backward, forward)
        return loss_sum.item()

    def _collect(self) -> None:
        """Add 16-bit gradients to those of the float32 masters, so that lanes are summed without rounding."""
        for name, master in self._masters.items():
            parameter = self._learned[name]
            if master is not parameter and parameter.grad is not None:
                gradient, parameter.grad = parameter.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    @override
    def update(
        self,
        learning_rate: float,
        most_norm: float = math.inf,
        of_depth: Callable[[int], float] | None = None,
    ) -> float:
        limit = self._section.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self._masters.values(), limit).item()
        if norm <= most_norm and math.isfinite(norm):
            optimizers.set_learning_rate(self.optimizer, learning_rate, of_depth)
            self.optimizer.step()
            self._guards.after_step(self.optimizer)
            self._copy_back()
        self.optimizer.zero_grad()
        return norm

    def _copy_back(self) -> None:
        with torch.no_grad():
            for name, master in self._masters.items():
                if master is not self._learned[name]:
                    self._learned[name].copy_(master)

    @torch.no_grad()
    @override
    def loss_sum(self, batch: Batch) -> float:
        self.module.eval()
        try:
            return self.module(**self.module.inputs(batch, self.device)).item()
        finally:
            self.module.train()

    @torch.no_grad()
    @override
    def told(self, batch: Batch) -> tuple[float, np.ndarray]:
        self.module.eval()
        try:
            loss, outputs = self.module(**self.module.inputs(batch, self.device), told=True)
            return loss.item(), outputs.float().cpu().numpy()
        finally:
            self.module.train()

    @contextmanager
    @override
    def generating(self) -> Iterator[tuple[Any, bool]]:
        self.module.eval()
        try:
            yield self.module.model, False
        finally:
            self.module.train()

    @override
    def add_squares(self, batch: Batch) -> None:
        self.module.eval()
        try:
            self.module(**self.module.inputs(batch, self.device)).backward()
            self._collect()
            add_squares(self.optimizer)
        finally:
            self.module.train()
            self.optimizer.zero_grad()

    @override
    def scale_squares(self, factor: float) -> None:
        scale_squares(self.optimizer, factor)

    @override
    def exchange_average(self) -> None:
        exchange(self.optimizer)
        self._copy_back()

    @override
    def slots(self) -> Iterator[Slot]:
        for name, parameter in self._parameters.items():
            if name not in self._masters:
                yield view_slot(name, "frozen", parameter)
                continue
            yield view_slot(name, "param", self._masters[name])
            for key, value in self.optimizer.state[self._masters[name]].items():
                if torch.is_tensor(value) and key != "step":
                    yield view_slot(name, key, value)
        yield from buffer_slots(self.module)

    @override
    def frozen(self) -> frozenset[str]:
        return frozenset(self._parameters.keys() - self._learned.keys())

    @override
    def optimizer_step(self) -> int:
        steps = [int(state["step"]) for state in self.optimizer.state.values() if "step" in state]
        return steps[0] if steps else 0

    @override
    def finish_load(self, optimizer_step: int) -> None:
        optimizers.set_step(self.optimizer, optimizer_step)
        self._copy_back()


def buffer_slots(
    module: Learner, owned: Callable[[int], bool] = lambda index: True
) -> Iterator[Slot]:
    """Iterate over the buffers that belong to the model's saved state."""
    persistent = set(module.state_dict().keys()) - {
        name for name, _ in module.named_parameters(remove_duplicate=False)
    }
    buffers = [(name, tensor) for name, tensor in module.named_buffers() if name in persistent]
    for index, (name, tensor) in enumerate(buffers):
        yield view_slot(name.removeprefix("model."), "buffer", tensor, owned(index))
