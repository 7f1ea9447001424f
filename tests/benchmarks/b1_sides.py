"""The sides of B1 in one rank process: dist_ft, the bare DeepSpeed loop, Hugging Face's trainer.

All three train on the same sequences in the same order, with the same weights, optimizer settings
and DeepSpeed config. Their losses are compared, so no side can skip work. A side runs one block of
steps per call and returns the seconds of each step. Hugging Face's loop cannot be paused from
outside, so it
drives the others: its callback runs their blocks between two of its own.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import RunConfig
from dist_ft.core.world import World
from dist_ft.data.batch import Batch
from dist_ft.data.batching.loader import Loader
from dist_ft.engine import deepspeed_config, deepspeed_engine, optimizers
from dist_ft.runtime.bootstrap import training_run
from dist_ft.training.components import Components
from dist_ft.training.run_context import RunContext
from dist_ft.training.trainer import Trainer


class RecordingTrainer(Trainer):
    """A trainer with access to its components; the training itself is unchanged.

    Attributes:
        instance: the trainer of this process, once it exists.
    """

    instance: RecordingTrainer | None = None

    def __init__(self, run: ResolvedRun, components: Components, *args: Any) -> None:
        super().__init__(run, components, *args)
        self.components = components
        type(self).instance = self

    @property
    def loss(self) -> float:
        """The loss of the last step, the same on all ranks."""
        return float("nan") if self._loss is None else self._loss


class Ours:
    """A whole run (`runtime.bootstrap.training_run.run`) in its own thread.

    It is paused between blocks, in the call of `RunContext.should_stop` that it does once a step.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        """Start the run and wait until it is paused at its first step."""
        self._block_steps = 0
        self._stamps: list[float] = []
        self._resume, self._paused = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._stop = False
        self._thread = threading.Thread(target=self._run, args=(config, world), daemon=True)
        training_run.Trainer = RecordingTrainer  # type: ignore[misc, assignment]
        self._thread.start()
        self._wait()
        if RecordingTrainer.instance is None:
            raise RuntimeError("the run has no trainer")
        self.trainer = RecordingTrainer.instance

    def block(self, count: int) -> list[float]:
        """Run `count` steps and return the seconds of each, between calls of `should_stop`."""
        self._block_steps, self._stamps = count, []
        self._paused.clear()
        self._resume.set()
        self._wait()
        return _durations(self._stamps)

    def close(self) -> None:
        """Request the run to stop and wait until it has ended."""
        self._stop = True
        self._resume.set()
        self._thread.join()

    def _run(self, config: RunConfig, world: World) -> None:
        try:
            training_run.run(config, world, RunContext(should_stop=self._should_stop))
        except BaseException as error:
            self._error = error
        self._paused.set()

    def _should_stop(self) -> bool:
        """Record the time; at the end of a block, pause until the next one."""
        if self._stamps:
            self._stamps.append(time.perf_counter())
        if len(self._stamps) == self._block_steps + bool(self._block_steps):
            self._resume.clear()
            self._paused.set()
            self._resume.wait()
            self._stamps.append(time.perf_counter())
        return self._stop

    def _wait(self) -> None:
        self._paused.wait()
        if self._error is not None:
            raise RuntimeError("the run ended early") from self._error


class Bare:
    """`deepspeed.initialize`, then forward, backward and step, and nothing else."""

    def __init__(self, config: RunConfig, batches: list[dict[str, torch.Tensor]]) -> None:
        import deepspeed

        self.batches = itertools.cycle(batches)
        settings = deepspeed_config.build_deepspeed_config(config)
        with deepspeed_engine.zero_init(settings):
            model = load_model(config)
        optimizer = optimizers.build_optimizer(_groups(model, config), config.optimizer)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.engine.train()
        self.loss = torch.zeros(())

    def block(self, count: int) -> list[float]:
        """Run `count` steps and return the seconds of each."""
        stamps = [time.perf_counter()]
        for _ in range(count):
            loss = self.engine(**next(self.batches), use_cache=False).loss
            self.engine.backward(loss)
            self.engine.step()
            self.loss = loss.detach()
            stamps.append(time.perf_counter())
        return _durations(stamps)


class HuggingFaceTimes(NamedTuple):
    """The measurements of `run_hugging_face`.

    Attributes:
        wall_s: seconds of each step.
        cpu_s: CPU seconds of each step, of all threads.
        first_loss: the loss of the first step.
    """

    wall_s: list[float]
    cpu_s: list[float]
    first_loss: float


def run_hugging_face(
    config: RunConfig,
    rows: torch.Tensor,
    folder: Path,
    steps: int,
    between: Callable[[int], None],
    log_every: int,
) -> HuggingFaceTimes:
    """Train with transformers' Trainer.

    Args:
        rows: (steps * global_batch, T) token ids, in training order.
        folder: its output folder.
        steps: optimizer steps.
        between: called before each step with the number of steps done; its time is not counted.
        log_every: steps between its log entries.
    """
    from torch.utils.data import SequentialSampler
    from transformers import Trainer as HFTrainer
    from transformers import TrainerCallback, TrainingArguments

    ends: list[Clocks] = []  # of the step before; the first entry is the start of training
    starts: list[Clocks] = []

    class BetweenSteps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(read_clocks())
            between(state.global_step)
            starts.append(read_clocks())

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(read_clocks())

    class InOrder(HFTrainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(rows)

    section = config.optimizer
    settings = deepspeed_config.build_deepspeed_config(config)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        use_cpu=True,
        deepspeed=settings,
        per_device_train_batch_size=config.batch.micro_batch,
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        adam_beta1=section.beta1,
        adam_beta2=section.beta2,
        adam_epsilon=section.eps,
        max_grad_norm=section.max_grad_norm,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to="none",
        logging_steps=log_every,
        logging_first_step=True,
        dataloader_pin_memory=False,
    )
    with deepspeed_engine.zero_init(settings):
        model = load_model(config)
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    trainer = InOrder(model=model, args=arguments, train_dataset=data, callbacks=[BetweenSteps()])
    trainer.train()
    wall_s, cpu_s = (np.array(ends[1:]) - np.array(starts)).T.tolist()
    return HuggingFaceTimes(wall_s, cpu_s, float(trainer.state.log_history[0]["loss"]))


class Clocks(NamedTuple):
    """Wall-clock seconds, and CPU seconds of all threads of this process."""

    wall_s: float
    cpu_s: float


def read_clocks() -> Clocks:
    """Return both clocks, each from an arbitrary start."""
    return Clocks(time.perf_counter(), time.process_time())


def load_model(config: RunConfig) -> Any:
    """Return the run's model as a plain transformers model."""
    from dist_ft.model.loading.load import load_causal_lm

    return load_causal_lm(config.model, config.data.cache_dir)


def _groups(model: Any, config: RunConfig) -> list[dict[str, Any]]:
    return optimizers.param_groups(dict(model.named_parameters()), config.optimizer.weight_decay)


def lane_tensors(loader: Loader, lanes: range, steps: int) -> list[dict[str, torch.Tensor]]:
    """Return the inputs of transformers' models for this rank's lane, by step."""
    inputs = []
    for step in range(steps):
        (batch,) = loader.batches(step, lanes)
        tokens = torch.from_numpy(_full_sequences(batch))
        inputs.append({"input_ids": tokens, "labels": tokens})
    return inputs


def all_rows(loader: Loader, num_lanes: int, steps: int) -> torch.Tensor:
    """Return token ids (steps * global_batch, T), in the order of steps, lanes and rows."""
    rows = []
    for step in range(steps):
        for batch in loader.batches(step, range(num_lanes)):
            rows.append(torch.from_numpy(_full_sequences(batch)))
    return torch.cat(rows)


def _full_sequences(batch: Batch) -> Any:
    """Return the ids of a batch without padding, on which the other sides would do more work."""
    if batch.num_tokens != batch.input_ids.size:
        raise ValueError("a sequence has padding; the benchmark needs full sequences")
    return batch.input_ids


def mean_over_ranks(value: float) -> float:
    """Return the mean over ranks; a collective call."""
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor)
    return float(tensor.item()) / dist.get_world_size()


def _durations(stamps: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(stamps)]
