"""The sides of B1 in one rank process: dist_ft, the bare DeepSpeed loop, Hugging Face's trainer.

All three learn from the same sequences in the same order, with the same weights, optimizer settings and
DeepSpeed config, and are asked for their losses so that nobody can leave work out. A side makes a block of
steps when told to and returns the seconds of each. Hugging Face's loop can not be held from outside, so it
drives: between two of its blocks its callback lets the others make theirs.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dist_ft.config.schema import RunConfig
from dist_ft.core.world import World
from dist_ft.data.batch import Batch
from dist_ft.data.batching.loader import Loader
from dist_ft.engine import deepspeed_config, deepspeed_engine, optimizers
from dist_ft.runtime.bootstrap import training_run
from dist_ft.training.components import Components
from dist_ft.training.run_context import RunContext
from dist_ft.training.trainer import Trainer


class Recording(Trainer):
    """The trainer, at hand for who wants to look inside; nothing of it is changed."""

    made: Recording | None = None

    def __init__(self, config: RunConfig, components: Components, *rest: Any) -> None:
        super().__init__(config, components, *rest)
        self.components = components
        type(self).made = self

    @property
    def loss(self) -> float:
        """The loss of the last step, the same on all ranks."""
        return float("nan") if self._loss is None else self._loss


class Ours:
    """A whole run (`runtime.build.run`) in a thread of its own, held where it asks whether to stop."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self._budget = 0
        self._stamps: list[float] = []
        self._go, self._held = threading.Event(), threading.Event()
        self._ended: BaseException | None = None
        self._stop = False
        self._thread = threading.Thread(target=self._run, args=(config, world), daemon=True)
        training_run.Trainer = Recording  # type: ignore[misc, assignment]
        self._thread.start()
        self._wait()
        if Recording.made is None:
            raise RuntimeError("the run has no trainer")
        self.trainer = Recording.made

    def block(self, count: int) -> list[float]:
        """Let the run make `count` steps and return the seconds of each, from one question to the next."""
        self._budget, self._stamps = count, []
        self._held.clear()
        self._go.set()
        self._wait()
        return _steps(self._stamps)

    def close(self) -> None:
        """Ask the run to stop and wait for it."""
        self._stop = True
        self._go.set()
        self._thread.join()

    def _run(self, config: RunConfig, world: World) -> None:
        try:
            training_run.run(config, world, RunContext(should_stop=self._should_stop))
        except BaseException as error:
            self._ended = error
        self._held.set()

    def _should_stop(self) -> bool:
        """Note the time; when the block is made, wait for the next."""
        if self._stamps:
            self._stamps.append(time.perf_counter())
        if len(self._stamps) == self._budget + bool(self._budget):
            self._go.clear()
            self._held.set()
            self._go.wait()
            self._stamps.append(time.perf_counter())
        return self._stop

    def _wait(self) -> None:
        self._held.wait()
        if self._ended is not None:
            raise RuntimeError("the run ended early") from self._ended


class Bare:
    """`deepspeed.initialize`, and forward, backward, step: nothing that a run needs besides."""

    def __init__(self, config: RunConfig, batches: list[dict[str, torch.Tensor]]) -> None:
        import deepspeed

        self.batches = itertools.cycle(batches)
        settings = deepspeed_config.build_deepspeed_config(config)
        with deepspeed_engine.zero_init(settings):
            model = load(config)
        optimizer = optimizers.build_optimizer(_groups(model, config), config.optimizer)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.engine.train()
        self.loss = torch.zeros(())

    def block(self, count: int) -> list[float]:
        """Make `count` steps and return the seconds of each."""
        stamps = [time.perf_counter()]
        for _ in range(count):
            loss = self.engine(**next(self.batches), use_cache=False).loss
            self.engine.backward(loss)
            self.engine.step()
            self.loss = loss.detach()
            stamps.append(time.perf_counter())
        return _steps(stamps)


def run_hugging_face(
    config: RunConfig,
    rows: torch.Tensor,
    folder: Path,
    steps: int,
    between: Callable[[int], None],
    log_every: int,
) -> tuple[list[float], list[float], float]:
    """Train with transformers' Trainer; return seconds and CPU seconds of each step, and the first loss.

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

    arrived: list[tuple[float, float]] = []
    left: list[tuple[float, float]] = []

    class Turn(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            arrived.append(clocks())
            between(state.global_step)
            left.append(clocks())

        def on_train_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            arrived.append(clocks())

    class InOrder(HFTrainer):
        def _get_train_sampler(self, *unused: Any) -> Any:
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
        model = load(config)
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    trainer = InOrder(model=model, args=arguments, train_dataset=data, callbacks=[Turn()])
    trainer.train()
    wall, cpu = (np.array(arrived[1:]) - np.array(left)).T.tolist()
    return wall, cpu, float(trainer.state.log_history[0]["loss"])


def clocks() -> tuple[float, float]:
    """Return seconds that passed, and seconds this process computed on all its threads."""
    return time.perf_counter(), time.process_time()


def load(config: RunConfig) -> Any:
    """Return the run's model as transformers gives it."""
    from dist_ft.model.loading.load import load_causal_lm

    return load_causal_lm(config.model, config.data.cache_dir)


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
    return [after - before for before, after in pairwise(stamps)]
