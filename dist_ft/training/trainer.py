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
from dist_ft.checkpoint.tier import Tier
from dist_ft.config.resolved_run import ResolvedRun
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
from dist_ft.training.components import Components
from dist_ft.training.console import format_evaluation, format_progress
from dist_ft.training.evaluation import EvaluationOutputs, evaluate, store_evaluation
from dist_ft.training.result import Result
from dist_ft.training.run_context import RunContext
from dist_ft.training.stragglers import StragglerDetector, gpu_memory_metrics

log = logging.getLogger("dist_ft.train")


class Trainer:
    """Trains from `progress` to the last step."""

    def __init__(
        self,
        run: ResolvedRun,
        components: Components,
        context: RunContext,
        progress: Progress,
        total_steps: int,
        evaluation: dict[str, float],
    ) -> None:
        config = run.config
        self._config = config
        self._task = run.task
        self._components = components
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
        components.evaluations[:] = [found for found in components.evaluations if found[0] <= progress.step]
        self._loss: float | None = None
        self._waited_s = self._steps_s = 0.0
        self._sources = source_names(config)
        self._drawn = np.zeros(2 * len(self._sources))
        self._saver = Saver(config, components, context, total_steps, progress.trained_s)

    def run(self) -> Result:
        """Train to the end and return how it went; raises Interrupted after a checkpoint if asked to stop."""
        cfg, components = self._config, self._components
        lanes = components.world.share(cfg.num_lanes)
        if self._step == 0 and cfg.evaluation.at_start:
            self._evaluate("before")
        components.time_ledger.enter("start")
        self._saver.prepare(self._step)
        watch = StragglerDetector(
            components.world, components.collectives, components.engine.device, cfg.log.straggler_steps
        )
        with (
            closing(watch) as pace,
            closing(components.loader.iterate(self._step, self._total_steps, lanes)) as stream,
        ):
            begun = time.perf_counter()
            components.time_ledger.enter("data")
            for batches in stream:
                waited = time.perf_counter() - begun
                components.time_ledger.enter("compute")
                stop, asked = self._train_step(batches, begun, waited)
                components.time_ledger.enter("other")
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
                tier: Tier | None = Tier.STORAGE
                if not (stop or asked or over):
                    tier = self._saver.due(self._step, last)
                saved = tier is not None and self._save(tier, last or stop or asked or over)
                if asked:
                    self._context.on_requested_save_end()
                if over:
                    break
                if stop and not last:
                    raise self._interrupted(saved)
                begun = time.perf_counter()
                components.time_ledger.enter("data")
        components.time_ledger.enter("save")
        self._saver.settle()
        return self._result()

    def _train_step(
        self, batches: Sequence[Batch], begun: float, waited: float
    ) -> tuple[bool, bool]:
        """Do one optimizer step; return whether some rank was asked to stop, and whether one was asked to save."""
        cfg, components, step = self._config, self._components, self._step
        self._context.callbacks.on_progress()
        fault_injection.hit("train.step", components.world.rank)
        counts = [
            sum(b.num_target_tokens for b in batches),
            sum(b.num_tokens for b in batches),
            self._context.should_stop(),
            self._context.should_save(),
            *self._saver.flags(),
            *by_source(batches, len(self._sources)),
        ]
        num_targets, num_tokens, stop, asked, *sums = components.collectives.sum(counts)
        self._saver.advance(*sums[:4])
        self._drawn += np.array(sums[4:])
        seeds = [derive_seed(cfg.run.seed, step, batch.lane) for batch in batches]
        evened, seeds = pad_to_equal_lanes(batches, seeds, components.world.largest_share(cfg.num_lanes))
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
        components, step, learned = self._components, self._step, batches
        components.engine.step = step + 1
        if components.minimum_risk is not None:
            learned, num_targets = components.minimum_risk.prepare(
                batches,
                step,
                components.engine,
                components.collectives,
                self._context.callbacks.on_progress,
            )
        loss_sum = components.engine.accumulate(learned, seeds, max(1, int(num_targets)))
        (total,) = components.collectives.sum([loss_sum])
        self._loss = loss = total / max(1.0, num_targets)
        reason = components.anomaly_detector.check_loss(step, loss)
        norm = components.engine.update(
            rate,
            -1.0 if reason else components.anomaly_detector.grad_norm_limit(),
            schedule.depth_scale(self._config.tuning, step),
        )
        reason = reason or components.anomaly_detector.check_grad_norm(norm)
        if reason:
            self._pass_over(batches, reason)
        else:
            components.anomaly_detector.record(loss, norm)
        return StepOutcome(total, norm)

    def _pass_over(self, batches: Sequence[Batch], reason: str) -> None:
        """The step has changed nothing: keep that with the run, and go on, back, or stop, as the config says."""
        components, step, section = self._components, self._step, self._config.anomaly
        if step in components.anomaly_detector.skipped_steps:
            log.info("step %d changes nothing: %s", step + 1, reason)
            return
        found = components.collectives.all_gather(
            np.concatenate([batch.segments[:, 0] for batch in batches])
        )
        samples = np.unique(np.concatenate(found))
        components.anomaly_detector.num_consecutive += 1
        if section.action == "stop" or components.anomaly_detector.num_consecutive > section.max_consecutive:
            raise anomaly.stop_error(section, step, reason, samples)
        first = step
        if section.action == "rollback":
            self._saver.settle()
            first = min(
                step, max(components.manager.latest_step, step + 1 - section.rollback_steps)
            )  # not before that commit
        with retry_limit(CRITICAL_ATTEMPTS):
            on_rank0(
                components.world,
                components.collectives,
                lambda: anomaly.write_skipped_steps(components.store, range(first, step + 1), reason, samples),
            )
        if components.world.rank == 0:
            log.warning(
                "step %d changes nothing: %s; its %d samples are passed over (%s)",
                step + 1,
                reason,
                len(samples),
                components.store.redacted_url(f"{anomaly.FOLDER}/step-{step:09d}.json"),
            )
        components.anomaly_detector.skipped_steps.update(range(first, step + 1))
        if section.action == "rollback":
            raise anomaly.RollbackRequested

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
        self._components.time_ledger.enter("other")
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
            **gpu_memory_metrics(self._components.engine.device),
        }
        if self._components.metrics is not None:
            self._log_metrics("train", values | self._source_metrics())
            left = seconds * (self._total_steps - self._step)
            self._context.console.show_progress(format_progress(self._step, self._total_steps, values, left))

    def _source_metrics(self) -> dict[str, float]:
        """Return sequences and tokens of each source since the last call, and its epoch; nothing with one source."""
        names, epochs = self._sources, self._components.loader.plan.epochs_done(self._step)
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
        if self._components.metrics is not None:
            self._components.metrics.add(self._step, kind, values)
            self._context.callbacks.on_metrics(self._step, kind, values)

    def _evaluate(self, label: str) -> None:
        """Evaluate if there is held-out data; `label` keeps the loss for the summary (before, after)."""
        components = self._components
        if components.evaluation is None:
            return
        components.time_ledger.enter("evaluation")
        averaged = self._config.evaluation.weights == "ema"
        if averaged:
            components.engine.swap_average()
        evaluation = evaluate(
            components.engine,
            components.evaluation,
            self._config.num_lanes,
            components.world,
            components.collectives,
            EvaluationOutputs(self._task, generator=components.held_out_generator),
            self._context.callbacks.on_progress,
        )
        if averaged:
            components.engine.swap_average()
        numbers = evaluation.metrics
        self._note(numbers, label)
        on_rank0(
            components.world,
            components.collectives,
            lambda: store_evaluation(components.store, self._step, evaluation),
        )
        if components.metrics is not None:
            self._log_metrics("evaluation", numbers)
            self._context.console.print(
                f"held-out loss at step {self._step}: {format_evaluation(numbers)}"
            )
            self._context.callbacks.on_evaluation(self._step, numbers)

    def _note(self, numbers: dict[str, float], label: str) -> None:
        """Keep an evaluation for the summary, for the checkpoint of this step, and for early stopping."""
        metric, told = self._config.checkpoint.best_by, self._components.evaluations
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
        section, plan = self._config.evaluation, self._components.loader.plan
        if _due(self._step, section.every_steps):
            return True
        epoch, within = plan.epoch_and_step(self._step) if section.every_epochs else (0, 1)
        return within == 0 and epoch % section.every_epochs == 0

    def _is_over(self) -> bool:
        """Tell whether the run ends early, now that this step was evaluated; the same on all ranks."""
        metric, told = self._config.checkpoint.best_by, self._components.evaluations
        if self._held_out[0] != self._step or not best.should_stop_early(
            metric, told, self._config.evaluation.patience
        ):
            return False
        step, value = best.find_best(metric, told)
        self._evaluation["after"] = self._held_out[1]["loss"]
        if self._components.world.rank == 0:
            self._context.console.print(
                f"ends early at step {self._step}: {metric} is no better than {value:.4f} of step "
                f"{step} since {self._config.evaluation.patience} evaluations"
            )
        return True

    def _save(self, tier: Tier, now: bool) -> bool:
        """Save; return whether this step is committed in storage by now."""
        values = {"loss": self._loss} if self._loss is not None else {}
        step, found = self._held_out
        evaluation = self._evaluation | (found if step == self._step else {})
        return self._saver.save(tier, self._progress(), values, evaluation, now)

    def _progress(self) -> Progress:
        return Progress(
            step=self._step,
            optimizer_step=self._components.engine.optimizer_step(),
            num_tokens=self._num_tokens,
            num_target_tokens=self._num_target_tokens,
            history=self._components.anomaly_detector.history,
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
