"""DeepSpeed ZeRO stages 0 to 3 behind the `Engine` interface. Only this module imports DeepSpeed.

For element-wise optimizers the losses equal those of the plain engine, for every stage and number
of workers. Every worker must call `train_step` with the same number of batches, and `loss_sum`
equally often. DeepSpeed's own checkpoints are not used: they are pickles bound to one world size.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from dist_ft.config.schema import OptimizerSection
from dist_ft.core.errors import ModelError
from dist_ft.core.world import World
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
from dist_ft.engine.torch_engine import buffer_slices, tensor_slice
from dist_ft.engine.zero_state import stage3_slices, stage12_slices
from dist_ft.model.adapters.added_layers import is_added
from dist_ft.model.adversarial import Adversary, train_lane
from dist_ft.model.experts import give_all_experts_gradients
from dist_ft.model.trainable_model import Inputs, TrainableModel, parameters_by_name


def import_deepspeed(use_gpu: bool) -> None:
    """Import DeepSpeed, which takes seconds; no GPU is used."""
    if not use_gpu:
        # Read when deepspeed is first imported; by itself it would choose a GPU that it finds.
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401


def attach_to_process_group(use_gpu: bool) -> None:
    """Make DeepSpeed use the process group that exists already.

    DeepSpeed's shared-memory operator is disabled. It is compiled on first use, and a process that
    is killed meanwhile leaves a lock on which every later start waits forever.
    """
    import_deepspeed(use_gpu)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if use_gpu else "gloo"
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False, verbose=False)


@contextlib.contextmanager
def zero_init(ds_config: dict[str, Any]) -> Iterator[None]:
    """Load models directly into ZeRO-3 partitions (zero.Init); no effect for other stages."""
    if ds_config["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    # transformers keeps a weak reference: from_pretrained shards only while this object lives.
    active = HfDeepSpeedConfig(ds_config)
    try:
        yield
    finally:
        del active


class DeepSpeedEngine(Engine):
    """A model sharded by DeepSpeed over `world`."""

    def __init__(
        self,
        module: TrainableModel,
        section: OptimizerSection,
        ds_config: dict[str, Any],
        world: World,
        group_by_depth: bool = False,
        adversary: Adversary | None = None,
        regularizers: Regularizers | None = None,
    ) -> None:
        """Shard the model and create the optimizer with its state. A collective call.

        Args:
            module: the model; for ZeRO-3 loaded inside `zero_init`.
            section: the optimizer settings.
            ds_config: the DeepSpeed config.
            world: this process among its peers.
            group_by_depth: use one parameter group per depth, for `update`'s `depth_scale`.
            adversary: perturbs embeddings in training.
            regularizers: run after each optimizer step.
        """
        import deepspeed

        self._adversary = adversary
        self._regularizers = regularizers or Regularizers()
        self._is_measuring_fisher = False
        self._world = world
        self._section = section
        self._stage: int = ds_config["zero_optimization"]["stage"]
        self._parameters = parameters_by_name(module)
        if self._stage == 3:
            self._require_sharded()
        give_all_experts_gradients(module, self._stage == 3)

        groups = optimizers.param_groups(
            self._parameters, section.weight_decay, group_by_depth, section.decay_exempt
        )
        optimizer = optimizers.build_optimizer(groups, section)
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
        self.device = self._engine.device
        self.module = module.train()

        # Only now: ZeRO has replaced the optimizer's parameters by its own partitions.
        self._create_state()
        self._update_ranks_after_steps(module.rank_schedule, self._torch_optimizer)

        # A step is skipped by replacing the torch optimizer's step, because DeepSpeed computes the
        # norm of the gradient and updates the weights in one call.
        self._norm = math.nan
        self._grad_norm_limit = math.inf
        self._step_optimizer = self._torch_optimizer.step
        self._torch_optimizer.step = self._step_if_allowed  # type: ignore[method-assign]

    def _require_sharded(self) -> None:
        """Raise ModelError if a weight, except added ones, is not sharded by ZeRO-3."""
        unsharded = [
            name
            for name, p in self._parameters.items()
            if not hasattr(p, "ds_id") and not is_added(name)
        ]
        if unsharded:
            raise ModelError(
                f"zero.stage=3: {len(unsharded)} weights, such as {unsharded[0]}, are whole on "
                "each worker, not sharded (zero.Init had no effect). Load the model inside "
                "`zero_init`."
            )

    @property
    def _zero_optimizer(self) -> Any:
        """DeepSpeed's ZeRO optimizer; at stage 0, the torch optimizer."""
        return self._engine.optimizer

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer that computes the update."""
        return self._zero_optimizer.optimizer if self._stage else self._zero_optimizer

    @override
    def accumulate(
        self, batches: Sequence[Batch], seeds: Sequence[int], num_target_tokens: int
    ) -> float:
        loss_sum = torch.zeros((), device=self.device)
        last = len(batches) - 1
        for index, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
            inputs = self.module.prepare_inputs(batch, self.device)

            def forward(
                model: nn.Module = self._engine, inputs: Inputs = inputs, seed: int = seed
            ) -> torch.Tensor:
                seed_random(seed, self.device)
                return model(**inputs)

            def backward(
                loss: torch.Tensor,
                weight: float = 1.0,
                is_last_of_lane: bool = True,
                index: int = index,
            ) -> None:
                is_boundary = index == last and is_last_of_lane
                self._engine.set_gradient_accumulation_boundary(is_boundary)
                # DeepSpeed averages over ranks; the loss is a sum over all target tokens
                scale = weight * self._world.num_ranks / num_target_tokens
                self._engine.backward(loss * scale, scale_wrt_gas=False)

            # A pass without gradients of weights calls the module itself: its hooks, which gather
            # weights, must run, but the engine's forward would prepare a backward of the weights.
            forward_for_gradient = functools.partial(forward, self.module)
            loss_sum += train_lane(self._adversary, forward, backward, forward_for_gradient)
        return loss_sum.item()

    @override
    def update(
        self,
        learning_rate: float,
        grad_norm_limit: float = math.inf,
        depth_scale: Callable[[int], float] | None = None,
    ) -> float:
        self._grad_norm_limit = grad_norm_limit
        if self._stage == 0:
            # DeepSpeed does not report the norm, but every worker holds the whole gradient. It is
            # clipped inside `step`, so the norm is computed before.
            gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
            self._norm = float(torch.nn.utils.get_total_norm(gradients))

        optimizers.set_learning_rate(self._zero_optimizer, learning_rate, depth_scale)
        self._engine.step()

        if self._stage == 0:
            return self._norm
        return float(self._engine.get_global_grad_norm())

    def _step_if_allowed(self, *args: Any, **kwargs: Any) -> Any:
        """Replace the torch optimizer's step; ZeRO calls it once it knows the gradient's norm."""
        norm = self._norm
        if self._stage:
            norm = float(self._zero_optimizer._global_grad_norm)

        # The partitions that the optimizer updates have gradients only during this call.
        if self._is_measuring_fisher:
            return accumulate_fisher(self._torch_optimizer)

        # The norm is global, so all ranks skip or none does; a NaN fails the first comparison.
        # DeepSpeed still clears the gradient and gathers the weights, which did not change.
        if not (norm <= self._grad_norm_limit and math.isfinite(norm)):
            return None
        result = self._step_optimizer(*args, **kwargs)
        self._regularizers.after_step(self._torch_optimizer)
        return result

    @override
    def accumulate_fisher(self, batch: Batch) -> None:
        # Clipping would scale the gradient before it is squared.
        with self._without_clipping():
            self.module.eval()
            self._is_measuring_fisher = True

            # Each call is a boundary: squares of gradients add up, not gradients. As in
            # `accumulate`, the number of ranks cancels DeepSpeed's average.
            loss = self._engine(**self.module.prepare_inputs(batch, self.device))
            self._engine.set_gradient_accumulation_boundary(True)
            self._engine.backward(loss * self._world.num_ranks, scale_wrt_gas=False)
            self._engine.step()

            self._is_measuring_fisher = False
            self.module.train()

    @contextlib.contextmanager
    def _without_clipping(self) -> Iterator[None]:
        """Disable gradient clipping."""
        # ZeRO copies the limit when it is created; only stage 0 reads the config in each step.
        if self._stage:
            owner, field = self._zero_optimizer, "clip_grad"
        else:
            owner, field = self._engine._config, "gradient_clipping"

        limit = getattr(owner, field)
        setattr(owner, field, 0.0)  # to DeepSpeed, no clipping
        try:
            yield
        finally:
            setattr(owner, field, limit)

    @override
    def scale_fisher(self, factor: float) -> None:
        scale_fisher(self._torch_optimizer, factor)

    @override
    def swap_average(self) -> None:
        swap_average(self._torch_optimizer)
        # The swap changes only the float32 masters, as loading a checkpoint does.
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
    def loss_and_outputs(self, batch: Batch) -> LossAndOutputs:
        self._engine.eval()
        try:
            inputs = self.module.prepare_inputs(batch, self.device)
            loss, outputs = self._engine(**inputs, return_outputs=True)
            return LossAndOutputs(loss.item(), outputs.float().cpu().numpy())
        finally:
            self._engine.train()

    @contextlib.contextmanager
    @override
    def generation_mode(self) -> Iterator[GenerationModel]:
        self._engine.eval()
        hooks = []
        is_sharded = self._stage == 3
        if is_sharded:
            # ZeRO-3 records the order of layers; the record must restart with each call of the
            # model. DeepSpeed's own hook is on the outer module, which `generate` bypasses.
            restart = self._zero_optimizer.parameter_offload.get_param_coordinator().reset_step
            hook = self.module.model.register_forward_pre_hook(lambda *_: restart(), prepend=True)
            hooks.append(hook)
        try:
            yield GenerationModel(self.module.model, is_collective=is_sharded)
        finally:
            for hook in hooks:
                hook.remove()
            self._engine.train()

    @override
    def state_slices(self) -> Iterator[StateSlice]:
        for index, (name, parameter) in enumerate(self._parameters.items()):
            owned = self._owns(index)
            if self._stage == 3:
                yield from self._stage3_slices(name, parameter)
            elif not parameter.requires_grad:
                yield tensor_slice(name, "frozen", parameter, owned)
            elif self._stage == 0:
                yield tensor_slice(name, "param", parameter, owned)
                for key, value in self._torch_optimizer.state[parameter].items():
                    # The step count is one number for all weights: `optimizer_step`.
                    if torch.is_tensor(value) and key != "step":
                        yield tensor_slice(name, key, value, owned)
            else:
                yield from stage12_slices(name, parameter)
        yield from buffer_slices(self.module, self._owns)

    def _owns(self, index: int) -> bool:
        """Whether this rank saves the replicated tensor of an index."""
        # Round robin spreads the writing of replicated tensors over all ranks.
        return index % self._world.num_ranks == self._world.rank

    def _stage3_slices(self, name: str, parameter: nn.Parameter) -> Iterator[StateSlice]:
        from deepspeed import utils

        return stage3_slices(name, parameter, self._world.rank, self._optimizer_state_keys(), utils)

    def _optimizer_state_keys(self) -> tuple[str, ...]:
        """Return the keys of the optimizer's state, the same on every rank and for every weight."""
        keys = optimizers.STATE_KEYS[self._section.name]
        if self._section.name == "sgd" and not self._section.momentum:
            keys = ()
        return (*keys, *self._regularizers.keys)

    @override
    def frozen_parameters(self) -> frozenset[str]:
        return frozenset(
            name for name, parameter in self._parameters.items() if not parameter.requires_grad
        )

    @override
    def optimizer_step(self) -> int:
        return optimizers.get_step(self._torch_optimizer)

    @override
    def finish_load(self, optimizer_step: int) -> None:
        optimizers.set_step(self._torch_optimizer, optimizer_step)
        zero = self._zero_optimizer

        # Slices were written to the float32 masters; the forward uses copies in the model's dtype.
        if self._stage in (1, 2):
            zero.update_lp_params()
        elif self._stage == 3:
            # A forward pass may have left some parameters gathered, with the old values.
            zero._partition_all_parameters()
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            # Small parameters stay gathered all the time; this gathers their new values.
            zero.checkpoint_event_epilogue()

    def _create_state(self) -> None:
        """Create the optimizer state before the first step, and register it in ZeRO-1 and 2."""
        # What the torch optimizer updates: parameters, or the flat float32 partitions of this rank.
        if self._stage == 0:
            tensors = [p for p in self._parameters.values() if p.requires_grad]
        elif self._stage == 3:
            tensors = self._zero_optimizer.fp32_partitioned_groups_flat
        else:
            tensors = self._zero_optimizer.single_partition_of_fp32_groups

        optimizers.create_state(
            self._torch_optimizer, self._section.name, self._section.momentum, tensors
        )
        self._regularizers.create_state(self._torch_optimizer, tensors)

        # DeepSpeed links the state to parameters once; state added later would have no address.
        if self._stage in (1, 2):
            self._zero_optimizer._lazy_init_hp_params_optimizer_state()

    @override
    def close(self) -> None:
        self._engine.destroy()
