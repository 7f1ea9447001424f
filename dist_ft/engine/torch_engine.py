"""The plain engine: one process, only PyTorch. It is the reference for the sharded engines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from typing_extensions import override

from dist_ft.config.schema import OptimizerSection
from dist_ft.data.batch import Batch
from dist_ft.engine import optimizers
from dist_ft.engine.base import (
    Engine,
    GenerationModel,
    LossAndOutputs,
    StateSlice,
    seed_random,
)
from dist_ft.engine.regularizers import Regularizers, accumulate_fisher, scale_fisher, swap_average
from dist_ft.model.adversarial import Adversary, train_lane
from dist_ft.model.experts import give_all_experts_gradients
from dist_ft.model.trainable_model import Inputs, TrainableModel, parameters_by_name


def tensor_slice(name: str, key: str, tensor: torch.Tensor, owned: bool = True) -> StateSlice:
    """Return the state slice of a tensor that is whole in this process."""

    def read() -> torch.Tensor:
        return tensor.detach().reshape(-1)

    def write(values: torch.Tensor) -> None:
        with torch.no_grad():
            tensor.copy_(values.view(tensor.shape))

    return StateSlice(name, key, 0, tensor.numel(), owned, read, write)


class TorchEngine(Engine):
    """Trains in this process, with float32 master weights for bfloat16 weights."""

    def __init__(
        self,
        module: TrainableModel,
        section: OptimizerSection,
        device: torch.device,
        group_by_depth: bool = False,
        adversary: Adversary | None = None,
        regularizers: Regularizers | None = None,
    ) -> None:
        """Move the model to `device` and create the optimizer with its state.

        Args:
            module: the model.
            section: the optimizer settings.
            device: where to train.
            group_by_depth: use one parameter group per depth, for `update`'s `depth_scale`.
            adversary: perturbs embeddings in training.
            regularizers: run after each optimizer step.
        """
        self.device = device
        self._adversary = adversary
        self._regularizers = regularizers or Regularizers()
        self.module = module.to(device).train()
        self._section = section
        self._parameters = parameters_by_name(module)
        give_all_experts_gradients(module)
        self._trained = {name: p for name, p in self._parameters.items() if p.requires_grad}

        # An update is often smaller than half the distance between two 16-bit numbers and would be
        # rounded away. So the optimizer updates float32 copies; float32 weights need none.
        self._masters: dict[str, torch.Tensor] = {}
        for name, parameter in self._trained.items():
            if parameter.dtype == torch.float32:
                self._masters[name] = parameter
            else:
                self._masters[name] = parameter.detach().float().requires_grad_()

        groups = optimizers.param_groups(
            self._masters,  # type: ignore[arg-type]
            section.weight_decay,
            group_by_depth,
            section.decay_exempt,
        )
        self.optimizer = optimizers.build_optimizer(groups, section)
        optimizers.create_state(
            self.optimizer, section.name, section.momentum, self._masters.values()
        )

        self._update_ranks_after_steps(module.rank_schedule, self.optimizer)
        self._regularizers.create_state(self.optimizer, self._masters.values())

    @override
    def accumulate(
        self, batches: Sequence[Batch], seeds: Sequence[int], num_target_tokens: int
    ) -> float:
        loss_sum = torch.zeros((), device=self.device)
        for batch, seed in zip(batches, seeds, strict=True):
            inputs = self.module.prepare_inputs(batch, self.device)

            # Every pass of a lane starts from the lane's seed, so that repeated passes (adversarial
            # training) draw the same dropout.
            def forward(inputs: Inputs = inputs, seed: int = seed) -> torch.Tensor:
                seed_random(seed, self.device)
                return self.module(**inputs)

            def backward(loss: torch.Tensor, weight: float = 1.0, is_last: bool = True) -> None:
                (loss * weight / num_target_tokens).backward()
                self._accumulate_in_masters()

            loss_sum += train_lane(self._adversary, forward, backward, forward)

        # Read once, at the end: each `item` makes the host wait for the device.
        return loss_sum.item()

    def _accumulate_in_masters(self) -> None:
        """Add 16-bit gradients to those of the float32 masters, to sum lanes without rounding."""
        for name, master in self._masters.items():
            parameter = self._trained[name]
            if master is parameter or parameter.grad is None:
                continue

            gradient = parameter.grad.float()
            parameter.grad = None
            if master.grad is None:
                master.grad = gradient
            else:
                master.grad.add_(gradient)

    @override
    def update(
        self,
        learning_rate: float,
        grad_norm_limit: float = math.inf,
        depth_scale: Callable[[int], float] | None = None,
    ) -> float:
        # max_grad_norm=0 disables clipping; the norm is computed in any case.
        clip_norm = self._section.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self._masters.values(), clip_norm).item()

        # A NaN fails the first comparison; an infinite norm passes it under the default limit.
        if norm <= grad_norm_limit and math.isfinite(norm):
            optimizers.set_learning_rate(self.optimizer, learning_rate, depth_scale)
            self.optimizer.step()
            self._regularizers.after_step(self.optimizer)
            # Last, because the regularizers change the masters too.
            self._copy_from_masters()

        self.optimizer.zero_grad()
        return norm

    def _copy_from_masters(self) -> None:
        with torch.no_grad():
            for name, master in self._masters.items():
                if master is not self._trained[name]:
                    self._trained[name].copy_(master)

    @torch.no_grad()
    @override
    def loss_sum(self, batch: Batch) -> float:
        self.module.eval()
        try:
            return self.module(**self.module.prepare_inputs(batch, self.device)).item()
        finally:
            self.module.train()

    @torch.no_grad()
    @override
    def loss_and_outputs(self, batch: Batch) -> LossAndOutputs:
        self.module.eval()
        try:
            inputs = self.module.prepare_inputs(batch, self.device)
            loss, outputs = self.module(**inputs, return_outputs=True)
            # numpy has no bfloat16.
            return LossAndOutputs(loss.item(), outputs.float().cpu().numpy())
        finally:
            self.module.train()

    @contextmanager
    @override
    def generation_mode(self) -> Iterator[GenerationModel]:
        self.module.eval()
        try:
            yield GenerationModel(self.module.model, is_collective=False)
        finally:
            self.module.train()

    @override
    def accumulate_fisher(self, batch: Batch) -> None:
        self.module.eval()
        try:
            self.module(**self.module.prepare_inputs(batch, self.device)).backward()
            self._accumulate_in_masters()
            accumulate_fisher(self.optimizer)
        finally:
            self.module.train()
            self.optimizer.zero_grad()

    @override
    def scale_fisher(self, factor: float) -> None:
        scale_fisher(self.optimizer, factor)

    @override
    def swap_average(self) -> None:
        swap_average(self.optimizer)
        self._copy_from_masters()

    @override
    def state_slices(self) -> Iterator[StateSlice]:
        for name, parameter in self._parameters.items():
            if name not in self._masters:
                yield tensor_slice(name, "frozen", parameter)
                continue

            master = self._masters[name]
            yield tensor_slice(name, "param", master)
            for key, value in self.optimizer.state[master].items():
                # The step count is one number for all weights: `optimizer_step`.
                if torch.is_tensor(value) and key != "step":
                    yield tensor_slice(name, key, value)
        yield from buffer_slices(self.module)

    @override
    def frozen_parameters(self) -> frozenset[str]:
        return frozenset(self._parameters.keys() - self._trained.keys())

    @override
    def optimizer_step(self) -> int:
        return optimizers.get_step(self.optimizer)

    @override
    def finish_load(self, optimizer_step: int) -> None:
        optimizers.set_step(self.optimizer, optimizer_step)
        self._copy_from_masters()


def buffer_slices(
    module: TrainableModel, is_owned: Callable[[int], bool] = lambda index: True
) -> Iterator[StateSlice]:
    """Iterate over the buffers that are part of the model's saved state.

    Args:
        module: the model.
        is_owned: whether this worker saves the buffer of an index.
    """
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}

    # torch has no list of persistent buffers; the state dict holds them and the parameters.
    persistent = set(module.state_dict().keys()) - parameters
    buffers = [(name, tensor) for name, tensor in module.named_buffers() if name in persistent]

    for index, (name, tensor) in enumerate(buffers):
        yield tensor_slice(name.removeprefix("model."), "buffer", tensor, is_owned(index))
