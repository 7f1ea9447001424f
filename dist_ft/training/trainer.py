"""The training loop. Read from top to bottom, it is what a run does.

Everything a step needs follows from its number: the samples (plan), the seeds (run seed, step,
lane) and the learning rate (schedule). What one rank knows and all must act on, a request to stop
or to save, is part of the small all-reduce that each step makes anyway.

Dimensions: N segments of a batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np

from dist_ft.checkpoint.manifest import Progress
from dist_ft.checkpoint.tier import Tier
from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.core import fault_injection
from dist_ft.core.seeds import derive_seed
from dist_ft.core.world import on_rank0
from dist_ft.data.batch import Batch
from dist_ft.data.batching.bad_rows import BadRowCounter
from dist_ft.engine import schedule
from dist_ft.engine.base import StepOutcome, pad_to_equal_lanes
from dist_ft.storage.retry import CRITICAL_ATTEMPTS, retry_limit
from dist_ft.training import anomaly, stopping
from dist_ft.training.checkpointing import Saver
from dist_ft.training.components import Components
from dist_ft.training.console import format_progress
from dist_ft.training.evaluator import Evaluator
from dist_ft.training.metrics_log import log_metrics
from dist_ft.training.result import Result
from dist_ft.training.run_context import RunContext
from dist_ft.training.source_counts import SourceCounts
from dist_ft.training.stopping import Requests, StopPoint
from dist_ft.training.stragglers import StragglerDetector, gpu_memory_metrics

log = logging.getLogger("dist_ft.train")


class _StepTime(NamedTuple):
    """When a step started (`time.perf_counter`), and the seconds it waited for data."""

    start_s: float
    waited_s: float

    def elapsed_s(self) -> float:
        """Return the seconds since the start of the step."""
        return time.perf_counter() - self.start_s


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
        """Continue after `progress`; `evaluation`: that stored with its checkpoint."""
        self._config = run.config
        self._components = components
        self._context = context
        self._total_steps = total_steps
        self._step = progress.step
        self._num_tokens = progress.num_tokens
        self._num_target_tokens = progress.num_target_tokens
        self._bad_rows = BadRowCounter(
            components.collectives, run.config.data.max_bad_rows, progress.num_bad_rows
        )
        self._loss: float | None = None
        self._waited_s = self._steps_s = 0.0
        self._sources = SourceCounts(run.config)
        self._evaluator = Evaluator(run, components, context, progress.step, evaluation)
        self._saver = Saver(run.config, components, context, total_steps, progress.trained_s)

    def run(self) -> Result:
        """Train to the last step and return the result.

        Raises:
            Interrupted: a stop was requested; a checkpoint is saved before.
            LimitReached: the run used its time; a checkpoint is saved before.
        """
        config, components, ledger = self._config, self._components, self._components.time_ledger

        # A run that resumes has this result already, from its checkpoint.
        if self._step == 0 and config.evaluation.at_start:
            self._evaluator.evaluate(0, "before")

        ledger.enter("start")
        self._saver.prepare(self._step)

        detector = StragglerDetector(
            components.world,
            components.collectives,
            components.engine.device,
            config.log.straggler_steps,
        )
        lanes = components.world.share(config.num_lanes)
        batches_by_step = components.loader.iterate(self._step, self._total_steps, lanes)

        # Both have a thread, which must end here: a rollback starts another trainer.
        with closing(detector), closing(batches_by_step):
            start_s = time.perf_counter()
            ledger.enter("data")
            for batches in batches_by_step:
                step_time = _StepTime(start_s, time.perf_counter() - start_s)
                ledger.enter("compute")
                requests = self._train_step(batches, step_time)
                ledger.enter("other")
                self._finish_step(batches, step_time, detector)

                is_last = self._step == self._total_steps
                if is_last and config.evaluation.at_end:
                    self._evaluator.evaluate(self._step, "after")
                elif self._evaluator.is_due(self._step):
                    self._evaluator.evaluate(self._step)

                # After the evaluation, whose metrics are stored with the checkpoint of the step.
                stops_early = not is_last and self._evaluator.should_stop_early(self._step)
                is_saved = self._save_if_due(requests, is_last, stops_early)
                if requests.save:
                    self._context.on_requested_save_end()
                if stops_early:
                    break

                # At the last step nothing is left to interrupt: the run is complete.
                if requests.stops and not is_last:
                    url = str(self._saver.url) if is_saved else None
                    point = StopPoint(self._step, self._total_steps, url)
                    raise stopping.stop_error(requests, point, components)

                start_s = time.perf_counter()
                ledger.enter("data")

        # Without checkpoint.at_end, a save in the background may still be in progress.
        ledger.enter("save")
        self._saver.settle()
        return self._result()

    def _train_step(self, batches: Sequence[Batch], step_time: _StepTime) -> Requests:
        """Run one training step; return what was requested from any rank."""
        config, components, step = self._config, self._components, self._step
        self._context.callbacks.on_progress()
        fault_injection.hit("train.step", components.world.rank)

        # One sum over all ranks: tokens, requests, the state of saves, tokens of each source. A
        # request that any rank got is above 0 on all.
        save_flags = self._saver.flags()
        bad_rows = components.loader.take_bad_rows()
        own_counts = [
            sum(batch.num_target_tokens for batch in batches),
            sum(batch.num_tokens for batch in batches),
            self._context.should_stop(),
            self._context.should_save(),
            stopping.is_limit_reached(components),
            bad_rows.num_rows,
            *save_flags,
            *self._sources.count(batches),
        ]
        totals = components.collectives.sum(own_counts)
        num_targets, num_tokens, stop, save, limit, num_bad, *rest = totals
        self._bad_rows.add(int(num_bad), bad_rows)
        self._saver.advance(*rest[: len(save_flags)])
        self._sources.add(rest[len(save_flags) :])

        # Every rank runs the same number of lanes, some of them empty.
        seeds = [derive_seed(config.run.seed, step, batch.lane) for batch in batches]
        most_lanes = components.world.largest_share(config.num_lanes)
        padded, seeds = pad_to_equal_lanes(batches, seeds, most_lanes)
        factor = schedule.learning_rate_factor(config.schedule, step, self._total_steps)
        learning_rate = config.optimizer.learning_rate * factor
        outcome = self._update_weights(padded, seeds, num_targets, learning_rate)

        self._step += 1
        self._num_tokens += int(num_tokens)
        self._num_target_tokens += int(num_targets)
        is_reported = config.log.every_steps and self._step % config.log.every_steps == 0
        if is_reported or self._step == self._total_steps:
            counts = {"num_target_tokens": num_targets, "num_tokens": num_tokens}
            self._report_step(outcome, counts, learning_rate, step_time)

        return Requests(stop > 0, save > 0, limit > 0)

    def _update_weights(
        self,
        batches: Sequence[Batch],
        seeds: Sequence[int],
        num_targets: float,
        learning_rate: float,
    ) -> StepOutcome:
        """Update the weights with the global batch, unless its loss or gradient is an anomaly.

        Returns the loss and the gradient norm, the same on all workers.
        """
        components, step = self._components, self._step
        engine, detector = components.engine, components.anomaly_detector
        engine.step = step + 1

        # Minimum risk training replaces the batches by sampled text, and counts samples.
        trained_batches = batches
        if components.minimum_risk is not None:
            trained_batches, num_targets = components.minimum_risk.prepare(
                batches,
                step,
                engine,
                components.collectives,
                self._context.callbacks.on_progress,
            )

        # At least 1: a global batch without any target has gradients of 0, not of 0 / 0.
        loss_sum = engine.accumulate(trained_batches, seeds, max(1, int(num_targets)))
        (total,) = components.collectives.sum([loss_sum])
        self._loss = loss = total / max(1.0, num_targets)

        # The total is equal on all ranks, so all find the same anomaly. The update is called then
        # too, because it discards the gradient; no norm is at most -1, so weights do not change.
        reason = detector.check_loss(step, loss)
        norm_limit = detector.grad_norm_limit()
        if reason:
            norm_limit = -1.0

        depth_scale = schedule.depth_scale(self._config.tuning, step)
        norm = engine.update(learning_rate, norm_limit, depth_scale)
        reason = reason or detector.check_grad_norm(norm)
        if reason:
            self._handle_anomaly(batches, reason)
        else:
            detector.record(loss, norm)

        return StepOutcome(total, norm)

    def _handle_anomaly(self, batches: Sequence[Batch], reason: str) -> None:
        """Store that the update of this step was skipped; then continue, roll back or stop.

        Raises:
            AnomalyError: the config says to stop, or too many steps in a row were skipped.
            RollbackRequested: the config says to roll back.
        """
        components, step, section = self._components, self._step, self._config.anomaly
        detector = components.anomaly_detector
        if step in detector.skipped_steps:
            log.info("step %d: the update was skipped: %s", step + 1, reason)
            return

        # `batches` are those of the data, also where text was sampled from the model instead.
        own_samples = np.concatenate([batch.segments[:, 0] for batch in batches])  # (N,)
        all_samples = components.collectives.all_gather(own_samples)
        samples = np.unique(np.concatenate(all_samples))  # each id once, sorted
        detector.num_consecutive += 1
        if section.action == "stop" or detector.num_consecutive > section.max_consecutive:
            raise anomaly.stop_error(section, step, reason, samples)

        first_skipped = step
        if section.action == "rollback":
            # A save in progress may end as the latest checkpoint, and decides what is repeated.
            self._saver.settle()

            # Steps before the latest checkpoint are not repeated, so they are not skipped either.
            first_skipped = max(components.manager.latest_step, step + 1 - section.rollback_steps)
            first_skipped = min(step, first_skipped)

        # Stored before any rank continues, or a replay after a kill might not skip the step.
        skipped = range(first_skipped, step + 1)
        with retry_limit(CRITICAL_ATTEMPTS):
            on_rank0(
                components.world,
                components.collectives,
                lambda: anomaly.write_skipped_steps(components.store, skipped, reason, samples),
            )

        if components.world.rank == 0:
            log.warning(
                "step %d: the update was skipped: %s; its %d samples are skipped (%s)",
                step + 1,
                reason,
                len(samples),
                components.store.redacted_url(f"{anomaly.FOLDER}/step-{step:09d}.json"),
            )

        detector.skipped_steps.update(skipped)
        if section.action == "rollback":
            raise anomaly.RollbackRequested

    def _report_step(
        self,
        outcome: StepOutcome,
        counts: dict[str, float],
        learning_rate: float,
        step_time: _StepTime,
    ) -> None:
        """Log the metrics of the step and show its progress line, on rank 0.

        `counts`: num_target_tokens and num_tokens of the global batch.
        """
        components = self._components
        components.time_ledger.enter("other")
        elapsed_s = step_time.elapsed_s()
        assert self._loss is not None
        values = {
            "loss": self._loss,
            "learning_rate": learning_rate,
            "grad_norm": outcome.grad_norm,
            "step_s": elapsed_s,
            "data_wait_s": step_time.waited_s,
            "tokens_per_s": counts["num_tokens"] / elapsed_s,
            "num_target_tokens": counts["num_target_tokens"],
            **gpu_memory_metrics(components.engine.device),
        }
        if components.metrics is None:
            return

        epochs = components.loader.epochs_done(self._step)
        metrics = values | self._sources.take_metrics(epochs)
        log_metrics(components.metrics, self._context.callbacks, self._step, "train", metrics)
        left_s = elapsed_s * (self._total_steps - self._step)
        self._context.console.show_progress(
            format_progress(self._step, self._total_steps, values, left_s)
        )

    def _finish_step(
        self, batches: Sequence[Batch], step_time: _StepTime, detector: StragglerDetector
    ) -> None:
        """Record the step for straggler detection, the ledger and the callbacks."""
        pace = detector.after_step(self._step, step_time.waited_s)
        if pace:
            log_metrics(self._components.metrics, self._context.callbacks, self._step, "pace", pace)

        elapsed_s = step_time.elapsed_s()
        self._waited_s += step_time.waited_s
        self._steps_s += elapsed_s
        self._saver.after_step(self._step - 1, batches, elapsed_s)
        assert self._loss is not None
        self._context.callbacks.on_step_end(self._step, self._loss)

    def _save_if_due(self, requests: Requests, is_last: bool, stops_early: bool) -> bool:
        """Save if a checkpoint is due or must be; return whether this step is in storage now."""
        # Storage where a save is requested: the nodes themselves may be taken away soon.
        must_save = any(requests) or stops_early
        tier = Tier.STORAGE if must_save else self._saver.due(self._step, is_last)
        if tier is None:
            return False

        values = {}
        if self._loss is not None:
            values["loss"] = self._loss

        return self._saver.save(
            tier,
            self._progress(),
            values,
            self._evaluator.metrics_for_checkpoint(self._step),
            is_last or must_save,
        )

    def _progress(self) -> Progress:
        return Progress(
            step=self._step,
            optimizer_step=self._components.engine.optimizer_step(),
            num_tokens=self._num_tokens,
            num_target_tokens=self._num_target_tokens,
            history=self._components.anomaly_detector.history,
            trained_s=self._saver.trained_s,
            num_bad_rows=self._bad_rows.count,
        )

    def _result(self) -> Result:
        summary = self._evaluator.summary
        data_wait_share = None
        if self._steps_s:
            data_wait_share = self._waited_s / self._steps_s
        return Result(
            self._config.run_url,
            self._step,
            self._total_steps,
            self._loss,
            summary.get("before"),
            summary.get("after"),
            self._saver.url,
            data_wait_share,
        )
