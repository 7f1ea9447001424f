"""The sides of B1 in one rank process: dist_ft's trainer, the bare DeepSpeed loop, Hugging Face's trainer.

All three learn from the same sequences in the same order, with the same weights, optimizer settings and DeepSpeed
config, and are asked for their losses so that nobody can leave work out. A side runs a block of steps when told to and
returns the seconds of each step. Hugging Face's loop can not be left and entered again, so it drives: between two of
its blocks its callback runs the blocks of the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.checkpoint.manifest import Progress
from dist_ft.config.schema import RunConfig
from dist_ft.data.batch import Batch
from dist_ft.data.loader import Loader
from dist_ft.engine import deepspeed_engine, ds_config, optimizers
from dist_ft.runtime import build
from dist_ft.runtime.data import open_data
from dist_ft.storage import Store
from dist_ft.train.metrics import MetricsLog
from dist_ft.train.trainer import Hooks, Parts, Trainer
from dist_ft.world import World, collectives

Block = Callable[[int, int], list[float]]
"""(first step, number of steps) -> seconds of each step."""


class Ours:
    """A run as `runtime.build` wires it, its trainer called block by block."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.comms = collectives(world)
        store = Store(config.run_url)
        if world.rank == 0:
            build.begin(store, config, world)
        self.comms.barrier()
        self.data = open_data(config, store, world, self.comms)
        module, engine = build.open_engine(config, world, False)
        build._fill(config, module, engine, CheckpointManager(store, config.checkpoint, world, self.comms, 1), None)
        metrics = MetricsLog(store, 0, 1, config.log.tensorboard) if world.rank == 0 else None
        self.parts = Parts(engine, self.data.training, None,
                           CheckpointManager(store, config.checkpoint, world, self.comms, 1), metrics, world,
                           self.comms, build._tensors(module), build._aliases(module))
        self.loss = float("nan")

    def block(self, first: int, count: int) -> list[float]:
        """Train; the time of a step runs from one question whether to stop to the next."""
        stamps: list[float] = []

        def asked() -> bool:
            stamps.append(time.perf_counter())
            return False

        hooks = Hooks(should_stop=asked)
        trainer = Trainer(self.config, self.parts, hooks, Progress(step=first, optimizer_step=first), first + count, {})
        begun = time.perf_counter()
        self.loss = trainer.run().loss or 0.0
        return _steps([begun, *stamps[1:], time.perf_counter()])


class Bare:
    """`deepspeed.initialize`, and forward, backward, step: nothing that a run needs besides."""

    def __init__(self, config: RunConfig, batches: list[dict[str, torch.Tensor]]) -> None:
        import deepspeed

        self.batches = batches
        settings = ds_config.build(config)
        with deepspeed_engine.loading(settings):
            model = load(config)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizers.build(_groups(model, config), config.optimizer), config=settings,
            dist_init_required=False)
        self.engine.train()
        self.loss = torch.zeros(())

    def block(self, first: int, count: int) -> list[float]:
        """Train on the batches of steps first .. first + count - 1."""
        stamps = [time.perf_counter()]
        for batch in self.batches[first:first + count]:
            loss = self.engine(**batch, use_cache=False).loss
            self.engine.backward(loss)
            self.engine.step()
            self.loss = loss.detach()
            stamps.append(time.perf_counter())
        return _steps(stamps)


def run_hugging_face(config: RunConfig, rows: torch.Tensor, folder: Path, steps: int,
                     between: Callable[[int], bool], log_every: int) -> list[float]:
    """Train with transformers' Trainer and return the seconds of each of its steps and, last, its first loss.

    Args:
        rows: (steps * global_batch, T) token ids, in the order they are to be learned.
        folder: where it may write.
        steps: optimizer steps.
        between: called with the number of steps done before each of them; its time is not counted.
        log_every: steps between its log entries.
    """
    from torch.utils.data import SequentialSampler
    from transformers import Trainer as HFTrainer
    from transformers import TrainerCallback, TrainingArguments

    stamps: list[tuple[float, float]] = []

    class Turn(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            arrived = time.perf_counter()
            between(state.global_step)
            stamps.append((arrived, time.perf_counter()))

        def on_train_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            now = time.perf_counter()
            stamps.append((now, now))

    class InOrder(HFTrainer):
        def _get_train_sampler(self, *unused: Any) -> Any:
            return SequentialSampler(rows)

    section = config.optimizer
    settings = ds_config.build(config)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=config.batch.micro_batch, use_cpu=True,
        deepspeed=settings, learning_rate=section.learning_rate, weight_decay=section.weight_decay,
        adam_beta1=section.beta1, adam_beta2=section.beta2, adam_epsilon=section.eps,
        max_grad_norm=section.max_grad_norm, lr_scheduler_type="constant", optim="adamw_torch_fused",
        save_strategy="no", report_to="none", logging_steps=log_every, logging_first_step=True,
        dataloader_pin_memory=False)
    with deepspeed_engine.loading(settings):
        model = load(config)
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    trainer = InOrder(model=model, args=arguments, train_dataset=data, callbacks=[Turn()])
    trainer.train()
    seconds = [arrived - left for (_, left), (arrived, _) in zip(stamps, stamps[1:], strict=False)]
    return [*seconds, float(trainer.state.log_history[0]["loss"])]


def load(config: RunConfig) -> Any:
    """Return the run's model as transformers gives it."""
    from dist_ft.model.load import load_model

    return load_model(config.model, config.data.cache_dir)


def _groups(model: Any, config: RunConfig) -> list[dict[str, Any]]:
    return optimizers.param_groups(dict(model.named_parameters()), config.optimizer.weight_decay)


def lane_tensors(loader: Loader, lanes: range, steps: int) -> list[dict[str, torch.Tensor]]:
    """Return what transformers' models take, for this rank's lane of each step."""
    found = []
    for step in range(steps):
        (batch,) = loader.batches(step, lanes)
        tokens = torch.from_numpy(_full(batch))
        found.append({"input_ids": tokens, "labels": tokens})
    return found


def all_rows(loader: Loader, num_lanes: int, steps: int) -> torch.Tensor:
    """Return (steps * global_batch, T) token ids in the order of steps, lanes and places."""
    batches = [loader.batches(step, range(num_lanes)) for step in range(steps)]
    return torch.cat([torch.from_numpy(_full(batch)) for step in batches for batch in step])


def _full(batch: Batch) -> Any:
    """Return the ids of a batch of whole sequences: the others would do more work on padding."""
    if batch.num_tokens != batch.input_ids.size:
        raise ValueError("the data must fill every sequence")
    return batch.input_ids


def mean_over_ranks(value: float) -> float:
    """Return the mean over ranks; a collective call."""
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor)
    return float(tensor.item()) / dist.get_world_size()


def _steps(stamps: list[float]) -> list[float]:
    return [after - before for before, after in zip(stamps, stamps[1:], strict=False)]
