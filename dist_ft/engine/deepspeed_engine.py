"""DeepSpeed ZeRO stages 0 to 3 behind the `Engine` interface: the only module that imports DeepSpeed.

Guarantees: the same losses as the plain engine, whatever the stage and the number of workers, for element-wise
optimizers. Every worker must make the same number of `train_step` batches and `loss_sum` calls. DeepSpeed's own
checkpoints are not used: they are pickles bound to one world size.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from dist_ft.config.schema import OptimizerSection
from dist_ft.core.errors import ModelError
from dist_ft.core.world import World
from dist_ft.data.batch import Batch
from dist_ft.engine import optimizers
from dist_ft.engine.base import Engine, StateSlice, seed_random
from dist_ft.engine.regularizers import Regularizers, accumulate_fisher, scale_fisher, swap_average
from dist_ft.engine.torch_engine import buffer_slices, tensor_slice
from dist_ft.engine.zero_state import flat_slice, stage12_slices
from dist_ft.model.adapters.added_layers import (
    is_added,
)
from dist_ft.model.adversarial import Adversary, train_lane
from dist_ft.model.trainable_model import Inputs, TrainableModel, parameters_by_name


def import_deepspeed(use_gpu: bool) -> None:
    """Import DeepSpeed, which takes seconds; nothing on a GPU is touched."""
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is first imported
    import deepspeed  # noqa: F401


def attach_to_process_group(use_gpu: bool) -> None:
    """Point DeepSpeed at the process group that is already there (Ray's or ours).

    The shared-memory op is compiled on first use, and a process killed meanwhile leaves a lock that every later start
    waits on without limit; it is switched off.
    """
    import_deepspeed(use_gpu)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if use_gpu else "gloo", dist_init_required=False, verbose=False
    )


@contextlib.contextmanager
def zero_init(ds_config: dict[str, Any]) -> Iterator[None]:
    """While open, models load straight into ZeRO-3 partitions (zero.Init); no effect for other stages."""
    if ds_config["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(ds_config)  # from_pretrained sees it only while it is referenced
    try:
        yield
    finally:
        del alive


class DeepSpeedEngine(Engine):
    """A model sharded by DeepSpeed over `world`."""

    def __init__(
        self,
        module: TrainableModel,
        section: OptimizerSection,
        ds_config: dict[str, Any],
        world: World,
        by_depth: bool = False,
        adversary: Adversary | None = None,
        guards: Regularizers | None = None,
    ) -> None:
        import deepspeed

        self._adversary = adversary
        self._guards = guards or Regularizers()
        self._measuring = False
        self._world = world
        self._section = section
        self._stage: int = ds_config["zero_optimization"]["stage"]
        self._parameters = parameters_by_name(module)
        whole = [
            name
            for name, p in self._parameters.items()
            if not hasattr(p, "ds_id") and not is_added(name)
        ]
        if self._stage == 3 and whole:
            raise ModelError(
                f"zero.stage=3: {len(whole)} weights, such as {whole[0]}, are whole on each worker, "
                "not sharded (zero.Init did not take); load the model inside `loading`"
            )
        groups = optimizers.param_groups(
            self._parameters, section.weight_decay, by_depth, section.decay_exempt
        )
        optimizer = optimizers.build_optimizer(groups, section)
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
        self.device = self._engine.device
        self.module = module.train()
        self._ensure_state()
        self._deal_ranks(module.rank_schedule, self._inner)
        self._norm, self._most_norm = math.nan, math.inf
        self._step_inner, self._inner.step = self._inner.step, self._step_if_allowed  # type: ignore[method-assign]

    @property
    def _zero(self) -> Any:
        """DeepSpeed's ZeRO optimizer (at stage 0, the plain one)."""
        return self._engine.optimizer

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The torch optimizer that makes the update."""
        return self._zero.optimizer if self._stage else self._zero

    @override
    def accumulate(
        self, batches: Sequence[Batch], seeds: Sequence[int], num_target_tokens: int
    ) -> float:
        loss_sum = torch.zeros((), device=self.device)
        last = len(batches) - 1
        for index, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
            inputs = self.module.prepare_inputs(batch, self.device)

            def forward(
                inner: nn.Module = self._engine, inputs: Inputs = inputs, seed: int = seed
            ) -> torch.Tensor:
                seed_random(seed, self.device)
                return inner(**inputs)

            def backward(
                loss: torch.Tensor, weight: float = 1.0, of_lane: bool = True, index: int = index
            ) -> None:
                self._engine.set_gradient_accumulation_boundary(index == last and of_lane)
                self._engine.backward(
                    loss * (weight * self._world.num_ranks / num_target_tokens), scale_wrt_gas=False
                )

            # only the module's own hooks, which gather weights, go along where no weight gets a gradient
            loss_sum += train_lane(
                self._adversary, forward, backward, functools.partial(forward, self.module)
            )
        return loss_sum.item()

    @override
    def update(
        self,
        learning_rate: float,
        grad_norm_limit: float = math.inf,
        of_depth: Callable[[int], float] | None = None,
    ) -> float:
        self._most_norm = grad_norm_limit
        if self._stage == 0:  # DeepSpeed tells no norm; every worker holds the whole gradient
            gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
            self._norm = float(torch.nn.utils.get_total_norm(gradients))
        optimizers.set_learning_rate(self._zero, learning_rate, of_depth)
        self._engine.step()
        return self._norm if self._stage == 0 else float(self._engine.get_global_grad_norm())

    def _step_if_allowed(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the torch optimizer's step, which ZeRO calls once it knows the norm of the whole gradient."""
        norm = self._norm if self._stage == 0 else float(self._zero._global_grad_norm)
        if self._measuring:
            return accumulate_fisher(self._inner)
        if not (norm <= self._most_norm and math.isfinite(norm)):
            return None
        result = self._step_inner(*args, **kwargs)
        self._guards.after_step(self._inner)
        return result

    @override
    def accumulate_fisher(self, batch: Batch) -> None:
        owner, field = (
            (self._zero, "clip_grad")
            if self._stage
            else (self._engine._config, "gradient_clipping")
        )
        limit = getattr(owner, field)
        setattr(owner, field, 0.0)
        self.module.eval()
        self._measuring = True
        loss = self._engine(**self.module.prepare_inputs(batch, self.device))
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(loss * self._world.num_ranks, scale_wrt_gas=False)
        self._engine.step()
        self._measuring = False
        self.module.train()
        setattr(owner, field, limit)

    @override
    def scale_fisher(self, factor: float) -> None:
        scale_fisher(self._inner, factor)

    @override
    def swap_average(self) -> None:
        swap_average(self._inner)
        self.finish_load(self.optimizer_step())

    @torch.no_grad()
    @override
    def loss_sum(self, batch: Batch) -> float:
        self._engine.eval()
        try:
            return self._engine(**self.module.prepare_inputs(batch, self.device)).item()
        finally:
            self._engine.train()

    @torch.no_grad()
    @override
    def loss_and_outputs(self, batch: Batch) -> tuple[float, np.ndarray]:
        self._engine.eval()
        try:
            loss, outputs = self._engine(**self.module.prepare_inputs(batch, self.device), return_outputs=True)
            return loss.item(), outputs.float().cpu().numpy()
        finally:
            self._engine.train()

    @contextlib.contextmanager
    @override
    def generation_mode(self) -> Iterator[tuple[Any, bool]]:
        self._engine.eval()
        hooks = []
        if (
            self._stage == 3
        ):  # its record of the order of layers begins anew where the outermost module is called
            begin = self._zero.parameter_offload.get_param_coordinator().reset_step
            hooks.append(
                self.module.model.register_forward_pre_hook(lambda *_: begin(), prepend=True)
            )
        try:
            yield self.module.model, self._stage == 3
        finally:
            for hook in hooks:
                hook.remove()
            self._engine.train()

    @override
    def state_slices(self) -> Iterator[StateSlice]:
        for index, (name, parameter) in enumerate(self._parameters.items()):
            mine = index % self._world.num_ranks == self._world.rank
            if self._stage == 3:
                yield from self._stage3_slots(name, parameter)
            elif not parameter.requires_grad:
                yield tensor_slice(name, "frozen", parameter, mine)
            elif self._stage == 0:
                yield tensor_slice(name, "param", parameter, mine)
                for key, value in self._inner.state[parameter].items():
                    if torch.is_tensor(value) and key != "step":
                        yield tensor_slice(name, key, value, mine)
            else:
                yield from stage12_slices(name, parameter)
        yield from buffer_slices(
            self.module, lambda index: index % self._world.num_ranks == self._world.rank
        )

    def _stage3_slots(self, name: str, parameter: nn.Parameter) -> Iterator[StateSlice]:
        """Rank r holds flat elements from r * ds_tensor.ds_numel; the last ranks hold padding, which is left out."""
        from deepspeed.utils import (
            safe_get_local_fp32_param,
            safe_get_local_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        held = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        offset = self._world.rank * held
        numel = min(held, parameter.ds_numel - offset)  # type: ignore[attr-defined]
        if numel <= 0:
            return
        if not parameter.requires_grad:
            yield flat_slice(name, "frozen", offset, numel, lambda: parameter.ds_tensor.data)  # type: ignore
            return

        def slot(key: str, get: Any, put: Any) -> StateSlice:
            def write(values: torch.Tensor) -> None:
                whole = get().detach().clone()
                whole[:numel] = values
                put(whole)

            return StateSlice(name, key, offset, numel, True, lambda: get().detach()[:numel], write)

        yield slot(
            "param",
            lambda: safe_get_local_fp32_param(parameter),
            lambda values: safe_set_local_fp32_param(parameter, values),
        )
        for key in self._state_keys():
            yield slot(
                key,
                lambda key=key: safe_get_local_optimizer_state(parameter, key),
                lambda values, key=key: safe_set_local_optimizer_state(parameter, values, key),
            )

    def _state_keys(self) -> tuple[str, ...]:
        plain = self._section.name == "sgd" and not self._section.momentum
        return (*(() if plain else optimizers.STATE_KEYS[self._section.name]), *self._guards.keys)

    @override
    def frozen_parameters(self) -> frozenset[str]:
        return frozenset(
            name for name, parameter in self._parameters.items() if not parameter.requires_grad
        )

    @override
    def optimizer_step(self) -> int:
        steps = [int(state["step"]) for state in self._inner.state.values() if "step" in state]
        return steps[0] if steps else 0

    @override
    def finish_load(self, optimizer_step: int) -> None:
        optimizers.set_step(self._inner, optimizer_step)
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            self._zero._partition_all_parameters()  # a forward may have left some gathered, with other values
            for group in range(len(self._zero.fp32_partitioned_groups_flat)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            self._zero.checkpoint_event_epilogue()

    def _ensure_state(self) -> None:
        """Make optimizer state exist, and ZeRO-1/2 know it, before the first step."""
        flats = {
            0: lambda: [p for p in self._parameters.values() if p.requires_grad],
            3: lambda: self._zero.fp32_partitioned_groups_flat,
        }
        tensors = flats.get(self._stage, lambda: self._zero.single_partition_of_fp32_groups)()
        optimizers.create_state(self._inner, self._section.name, self._section.momentum, tensors)
        self._guards.ensure(self._inner, tensors)
        if self._stage in (1, 2):
            self._zero._lazy_init_hp_params_optimizer_state()

    @override
    def close(self) -> None:
        self._engine.destroy()
