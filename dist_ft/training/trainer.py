"""The loop: read from top to bottom, this is what a run does.

Everything a step needs follows from its number: which samples (plan), which seeds (run seed, step, lane), which
learning rate (schedule). What a rank alone knows and all must act on (a wish to stop, or to save) travels with the one
small all-reduce each step makes anyway.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import closing

import numpy as np

from dist_ft.checkpoint.manifest import Progress
from dist_ft.config.schema import RunConfig
from dist_ft.core import fault_injection
from dist_ft.core.errors import ConfigError, Interrupted
from dist_ft.core.logs import redact
from dist_ft.core.seeds import (
    derive_seed,
)
from dist_ft.core.world import on_rank0
from dist_ft.data.batch import Batch
from dist_ft.engine import schedule
from dist_ft.engine.base import StepOutcome, pad_to_equal_lanes
from dist_ft.metrics import best
from dist_ft.storage.retry import CRITICAL_ATTEMPTS, retry_limit
from dist_ft.training import anomaly
from dist_ft.training.checkpointing import Saver
from dist_ft.training.components import Parts
from dist_ft.training.console import evaluation_line, progress_line
from dist_ft.training.evaluation import evaluate, keep_evaluation
from dist_ft.training.result import Result
from dist_ft.training.run_context import RunContext
from dist_ft.training.stragglers import Stragglers, gpu_memory

log = logging.getLogger("dist_ft.train")


class Trainer:
    """Trains from `progress` to the last step."""

    def __init__(
        self,
        config: RunConfig,
        parts: Parts,
        context: RunContext,
        progress: Progress,
        total_steps: int,
        evaluation: dict[str, float],
    ) -> None:
        self._config = config
        self._parts = parts
        self._context = context
        self._total_steps = total_steps
        self._step = progress.step
        self._num_tokens = progress.num_tokens
        self._num_target_tokens = progress.num_target_tokens
        self._evaluation = {
            label: loss for label, loss in evaluation.items() if label in ("before", "after")
        }
        self._held_out: tuple[int, dict[str, float]] = (
            -1,
            {},
        )  # the last evaluation: step, metrics
        parts.evaluated[:] = [found for found in parts.evaluated if found[0] <= progress.step]
        self._loss: float | None = None
        self._waited_s = self._steps_s = 0.0
        self._sources = source_names(config)
        self._drawn = np.zeros(2 * len(self._sources))
        self._saver = Saver(config, parts, context, total_steps, progress.trained_s)

    def run(self) -> Result:
        """Train to the end and return how it went; raises Interrupted after a checkpoint if asked to stop."""
        cfg, parts = self._config, self._parts
        lanes = parts.world.share(cfg.num_lanes)
        if self._step == 0 and cfg.evaluation.at_start:
            self._evaluate("before")
        parts.clock.to("start")
        self._saver.prepare(self._step)
        watch = Stragglers(
            parts.world, parts.collectives, parts.engine.device, cfg.log.straggler_steps
        )
        with (
            closing(watch) as pace,
            closing(parts.loader.iterate(self._step, self._total_steps, lanes)) as stream,
        ):
            begun = time.perf_counter()
            parts.clock.to("data")
            for batches in stream:
                waited = time.perf_counter() - begun
                parts.clock.to("compute")
                stop, asked = self._train_step(batches, begun, waited)
                parts.clock.to("other")
                found = pace.after_step(self._step, waited)
                if found:
                    self._log_metrics("pace", found)
                seconds = time.perf_counter() - begun
                self._waited_s += waited
                self._steps_s += seconds
                self._saver.after_step(self._step - 1, batches, seconds)
                assert self._loss is not None
                self._context.callbacks.on_step_end(self._step, self._loss)
                last = self._step == self._total_steps
                if last and cfg.evaluation.at_end:
                    self._evaluate("after")
                elif self._evaluation_due():
                    self._evaluate("")
                over = not last and self._is_over()
                kind = False if stop or asked or over else self._saver.due(self._step, last)
                saved = kind is not None and self._save(kind, last or stop or asked or over)
                if asked:
                    self._context.on_requested_save_end()
                if over:
                    break
                if stop and not last:
                    raise self._interrupted(saved)
                begun = time.perf_counter()
                parts.clock.to("data")
        parts.clock.to("save")
        self._saver.settle()
        return self._result()

    def _train_step(
        self, batches: Sequence[Batch], begun: float, waited: float
    ) -> tuple[bool, bool]:
        """Do one optimizer step; return whether some rank was asked to stop, and whether one was asked to save."""
        cfg, parts, step = self._config, self._parts, self._step
        self._context.callbacks.on_progress()
        fault_injection.hit("train.step", parts.world.rank)
        counts = [
            sum(b.num_target_tokens for b in batches),
            sum(b.num_tokens for b in batches),
            self._context.should_stop(),
            self._context.should_save(),
            *self._saver.flags(),
            *by_source(batches, len(self._sources)),
        ]
        num_targets, num_tokens, stop, asked, *sums = parts.collectives.sum(counts)
        self._saver.advance(*sums[:4])
        self._drawn += np.array(sums[4:])
        seeds = [derive_seed(cfg.run.seed, step, batch.lane) for batch in batches]
        evened, seeds = pad_to_equal_lanes(batches, seeds, parts.world.largest_share(cfg.num_lanes))
        rate = cfg.optimizer.learning_rate * schedule.learning_rate_factor(cfg.schedule, step, self._total_steps)
        outcome = self._learn(evened, seeds, num_targets, rate)
        self._step += 1
        self._num_tokens += int(num_tokens)
        self._num_target_tokens += int(num_targets)
        if _due(self._step, cfg.log.every_steps) or self._step == self._total_steps:
            self._report(outcome, num_targets, num_tokens, rate, begun, waited)
        return stop > 0, asked > 0

    def _learn(
        self, batches: Sequence[Batch], seeds: Sequence[int], num_targets: float, rate: float
    ) -> StepOutcome:
        """Learn from the global batch, unless its loss or gradient is bad; return those, as all workers know them."""
        parts, step, learned = self._parts, self._step, batches
        parts.engine.step = step + 1
        if parts.risk is not None:
            learned, num_targets = parts.risk.prepare(
                batches,
                step,
                parts.engine,
                parts.collectives,
                self._context.callbacks.on_progress,
            )
        loss_sum = parts.engine.accumulate(learned, seeds, max(1, int(num_targets)))
        (total,) = parts.collectives.sum([loss_sum])
        self._loss = loss = total / max(1.0, num_targets)
        reason = parts.judge.of_loss(step, loss)
        norm = parts.engine.update(
            rate,
            -1.0 if reason else parts.judge.most_norm(),
            schedule.depth_scale(self._config.tuning, step),
        )
        reason = reason or parts.judge.of_norm(norm)
        if reason:
            self._pass_over(batches, reason)
        else:
            parts.judge.sound(loss, norm)
        return StepOutcome(total, norm)

    def _pass_over(self, batches: Sequence[Batch], reason: str) -> None:
        """The step has changed nothing: keep that with the run, and go on, back, or stop, as the config says."""
        parts, step, section = self._parts, self._step, self._config.anomaly
        if step in parts.judge.vetoed:
            log.info("step %d changes nothing: %s", step + 1, reason)
            return
        found = parts.collectives.all_gather(
            np.concatenate([batch.segments[:, 0] for batch in batches])
        )
        samples = np.unique(np.concatenate(found))
        parts.judge.in_a_row += 1
        if section.action == "stop" or parts.judge.in_a_row > section.most_in_a_row:
            raise anomaly.stopped(section, step, reason, samples)
        first = step
        if section.action == "rollback":
            self._saver.settle()
            first = min(
                step, max(parts.manager.latest_step, step + 1 - section.rollback_steps)
            )  # not before that commit
        with retry_limit(CRITICAL_ATTEMPTS):
            on_rank0(
                parts.world,
                parts.collectives,
                lambda: anomaly.write_record(parts.store, range(first, step + 1), reason, samples),
            )
        if parts.world.rank == 0:
            log.warning(
                "step %d changes nothing: %s; its %d samples are passed over (%s)",
                step + 1,
                reason,
                len(samples),
                parts.store.shown(f"{anomaly.FOLDER}/step-{step:09d}.json"),
            )
        parts.judge.vetoed.update(range(first, step + 1))
        if section.action == "rollback":
            raise anomaly.RollBack

    def _report(
        self,
        outcome: StepOutcome,
        num_targets: float,
        num_tokens: float,
        rate: float,
        begun: float,
        waited: float,
    ) -> None:
        """Show the step."""
        self._parts.clock.to("other")
        seconds = time.perf_counter() - begun
        assert self._loss is not None
        values = {
            "loss": self._loss,
            "learning_rate": rate,
            "grad_norm": outcome.grad_norm,
            "step_s": seconds,
            "data_wait_s": waited,
            "tokens_per_s": num_tokens / seconds,
            "num_target_tokens": num_targets,
            **gpu_memory(self._parts.engine.device),
        }
        if self._parts.metrics is not None:
            self._log_metrics("train", values | self._source_metrics())
            left = seconds * (self._total_steps - self._step)
            self._context.console.progress(progress_line(self._step, self._total_steps, values, left))

    def _source_metrics(self) -> dict[str, float]:
        """Return sequences and tokens of each source since the last call, and its epoch; nothing with one source."""
        names, epochs = self._sources, self._parts.loader.plan.epochs_done(self._step)
        drawn, self._drawn = self._drawn, np.zeros_like(self._drawn)
        return {
            key: float(value)
            for i, name in enumerate(names)
            for key, value in (
                (f"sequences/{name}", drawn[2 * i]),
                (f"tokens/{name}", drawn[2 * i + 1]),
                (f"epoch/{name}", epochs[i]),
            )
        }

    def _log_metrics(self, kind: str, values: dict[str, float]) -> None:
        """Write a line of metrics, on rank 0."""
        if self._parts.metrics is not None:
            self._parts.metrics.add(self._step, kind, values)
            self._context.callbacks.on_metrics(self._step, kind, values)

    def _evaluate(self, label: str) -> None:
        """Evaluate if there is held-out data; `label` keeps the loss for the summary (before, after)."""
        parts = self._parts
        if parts.evaluation is None:
            return
        parts.clock.to("evaluation")
        averaged = self._config.evaluation.of == "ema"
        if averaged:
            parts.engine.swap_average()
        values = evaluate(
            parts.engine,
            parts.evaluation,
            self._config.num_lanes,
            parts.world,
            parts.collectives,
            self._context.callbacks.on_progress,
            self._config.task,
            texts=parts.texts,
        )
        if averaged:
            parts.engine.swap_average()
        numbers = {name: value for name, value in values.items() if isinstance(value, float | int)}
        self._note(numbers, label)
        on_rank0(
            parts.world, parts.collectives, lambda: keep_evaluation(parts.store, self._step, values)
        )
        if parts.metrics is not None:
            self._log_metrics("evaluation", numbers)
            self._context.console.say(
                f"held-out loss at step {self._step}: {evaluation_line(numbers)}"
            )
            self._context.callbacks.on_evaluation(self._step, numbers)

    def _note(self, numbers: dict[str, float], label: str) -> None:
        """Keep an evaluation for the summary, for the checkpoint of this step, and for early stopping."""
        metric, told = self._config.checkpoint.best_by, self._parts.evaluated
        if metric not in numbers:
            raise ConfigError(
                [
                    f"checkpoint.best_by={metric}: evaluations have no such metric; there are "
                    f"{', '.join(numbers)}; name one of them"
                ],
                "evaluation",
            )
        self._held_out = (
            self._step,
            {name: value for name, value in numbers.items() if name != "num_target_tokens"},
        )
        if not told or told[-1][0] < self._step:
            told.append((self._step, numbers[metric]))
        if label:
            self._evaluation[label] = numbers["loss"]

    def _evaluation_due(self) -> bool:
        section, plan = self._config.evaluation, self._parts.loader.plan
        if _due(self._step, section.every_steps):
            return True
        epoch, within = plan.epoch_and_step(self._step) if section.every_epochs else (0, 1)
        return within == 0 and epoch % section.every_epochs == 0

    def _is_over(self) -> bool:
        """Tell whether the run ends early, now that this step was evaluated; the same on all ranks."""
        metric, told = self._config.checkpoint.best_by, self._parts.evaluated
        if self._held_out[0] != self._step or not best.is_over(
            metric, told, self._config.evaluation.patience
        ):
            return False
        step, value = best.best(metric, told)
        self._evaluation["after"] = self._held_out[1]["loss"]
        if self._parts.world.rank == 0:
            self._context.console.say(
                f"ends early at step {self._step}: {metric} is no better than {value:.4f} of step "
                f"{step} since {self._config.evaluation.patience} evaluations"
            )
        return True

    def _save(self, on_nodes: bool, now: bool) -> bool:
        """Save; return whether this step is committed in storage by now."""
        values = {"loss": self._loss} if self._loss is not None else {}
        step, found = self._held_out
        evaluation = self._evaluation | (found if step == self._step else {})
        return self._saver.save(on_nodes, self._progress(), values, evaluation, now)

    def _progress(self) -> Progress:
        return Progress(
            step=self._step,
            optimizer_step=self._parts.engine.optimizer_step(),
            num_tokens=self._num_tokens,
            num_target_tokens=self._num_target_tokens,
            history=self._parts.judge.history,
            trained_s=self._saver.trained_s,
        )

    def _interrupted(self, saved: bool) -> Interrupted:
        """Return the error that says the run stopped as asked, and whether its last step is saved."""
        how = (
            f"it is saved as {redact(str(self._saver.url))}; the same command goes on from there"
            if saved
            else "storage failed and nothing is saved at this step (the log says why); the same command goes on from the "
            "checkpoint before"
        )
        return Interrupted(f"stopped at step {self._step} of {self._total_steps} as asked; {how}")

    def _result(self) -> Result:
        return Result(
            self._config.run_url,
            self._step,
            self._total_steps,
            self._loss,
            self._evaluation.get("before"),
            self._evaluation.get("after"),
            self._saver.url,
            self._waited_s / self._steps_s if self._steps_s else None,
        )


def source_names(config: RunConfig) -> list[str]:
    """Return what metrics call the sources of the training data; none where there is only one."""
    sources = config.data.train
    return (
        [source.name or f"source-{i}" for i, source in enumerate(sources)]
        if len(sources) > 1
        else []
    )


def by_source(batches: Sequence[Batch], count: int) -> list[float]:
    """Return [sequences, tokens] of each of `count` sources in `batches`, flat."""
    found = np.zeros((count, 2))
    for batch in batches if count else ():
        np.add.at(
            found,
            batch.row_sources[:, 0],
            np.column_stack([np.ones(len(batch.row_sources)), batch.row_sources[:, 1]]),
        )
    return found.reshape(-1).tolist()


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
