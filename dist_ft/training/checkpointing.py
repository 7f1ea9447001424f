"""When checkpoints are saved, and where.

There are two tiers: storage, and (if the config names a folder) the workers' own nodes. Each saves
every N steps, or `auto`: then rank 0 decides by what it measured, and its decision is part of the
sum over ranks that each step makes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from dist_ft.checkpoint.ledger import LedgerBuffer
from dist_ft.checkpoint.manifest import Progress
from dist_ft.checkpoint.save_interval import SaveCost, mean_time_between_failures_s
from dist_ft.checkpoint.save_status import SaveOutcome, SaveRequest
from dist_ft.checkpoint.tier import Tier
from dist_ft.config.schema import CheckpointSection, RunConfig
from dist_ft.data.batch import Batch
from dist_ft.storage.retry import CRITICAL_ATTEMPTS, retry_limit
from dist_ft.training.components import Components
from dist_ft.training.run_context import RunContext

log = logging.getLogger("dist_ft.train")
FIRST_SAVE_S = 60.0
"""`auto` saves first after this much training: then the cost of a save is known."""


class AutoInterval:
    """Decides when to save to a tier whose interval is `auto`.

    Attributes:
        cost: measured cost of a save.
    """

    def __init__(self, section: CheckpointSection, trained_s: float, num_failures: int) -> None:
        """Start as if a save had just been made; `trained_s`: training time of the run so far."""
        self._expected_s = section.failure_interval_s
        self._num_failures = num_failures
        self._last_save_s = trained_s
        self.cost = SaveCost()

    def is_due(self, trained_s: float) -> bool:
        """Return whether to save now."""
        failures_s = mean_time_between_failures_s(self._expected_s, trained_s, self._num_failures)
        interval_s = self.cost.optimal_interval_s(failures_s)

        # Without a measured cost: early enough, where failures are frequent, to come before one.
        if interval_s is None:
            interval_s = min(FIRST_SAVE_S, failures_s / 20)

        return trained_s - self._last_save_s >= interval_s

    def record_start(self, trained_s: float, blocked_s: float) -> None:
        """Record that a save has started, which blocked training for `blocked_s` seconds."""
        self._last_save_s = trained_s
        self.cost.record_start(blocked_s)


class Saver:
    """The saves of one attempt; all calls are the same on all ranks.

    Attributes:
        url: the latest checkpoint in storage; None before the first.
        trained_s: seconds that all steps of the run took so far.
    """

    def __init__(
        self,
        config: RunConfig,
        components: Components,
        context: RunContext,
        total_steps: int,
        trained_s: float,
    ) -> None:
        self._section = section = config.checkpoint
        self._name = config.run.name
        self._components = components
        self._context = context
        self._total_steps = total_steps
        self._ledger = LedgerBuffer()
        self._metrics: dict[str, float] = {}  # passed to callbacks when the current save commits
        self._intervals = {Tier.STORAGE: section.every_steps}
        if section.local_folder:
            self._intervals[Tier.LOCAL] = section.local_every_steps

        self._auto: dict[Tier, AutoInterval] = {}
        for tier, interval in self._intervals.items():
            if interval == "auto":
                self._auto[tier] = AutoInterval(section, trained_s, components.num_failures)

        self._auto_due = dict.fromkeys(Tier, False)
        self.trained_s = trained_s
        self.url: str | None = None

    def prepare(self, step: int) -> None:
        """Allocate the memory for saves in the background, if there will be any."""
        # Training waits for the last save, which needs no buffers; they are for saves before it.
        # With `auto`, whether there will be one is not known yet.
        steps_left = self._total_steps - step
        has_saves = any(
            interval == "auto" or 0 < interval < steps_left for interval in self._intervals.values()
        )
        if self._section.background and has_saves:
            self._components.manager.prepare(self._components.engine)

    def flags(self) -> tuple[float, ...]:
        """Return this rank's contribution to the sums that `advance` takes."""
        # Ranks measure different times and would decide differently: only rank 0 decides, and the
        # sum over ranks carries its decision to all.
        auto_due: list[float] = []
        for tier in Tier:
            is_due = False
            if self._components.world.rank == 0 and tier in self._auto:
                is_due = self._auto[tier].is_due(self.trained_s)
            auto_due.append(float(is_due))

        return (*self._components.manager.save_flags(), *auto_due)

    def advance(self, num_written: float, num_ended: float, *auto_due: float) -> None:
        """Advance the save in progress, and record where rank 0 decided to save.

        Args:
            num_written: ranks whose files of the current save are written.
            num_ended: 1 if the commit on rank 0 has ended.
            auto_due: for each tier, 1 if its automatic interval has passed.
        """
        self._auto_due = {tier: due > 0 for tier, due in zip(Tier, auto_due, strict=True)}
        self._handle_outcome(self._components.manager.advance(num_written, num_ended))

    def after_step(self, step: int, batches: Sequence[Batch], seconds: float) -> None:
        """Record that `step` (from 0) is done."""
        self._ledger.add(step, batches, self._components.loader.take_facts())
        self.trained_s += seconds

        # A step that is slowed down by a save to the other tier says nothing about this one: it is
        # neither a step without a save nor part of the cost.
        current = self._components.manager.save_in_progress
        for tier, auto in self._auto.items():
            if current is None or current.tier == tier:
                auto.cost.record_step(seconds, current is not None)

    def due(self, step: int, is_last: bool) -> Tier | None:
        """Return where a checkpoint is due after `step` steps; None if none is due."""
        if is_last and self._section.at_end:
            return Tier.STORAGE

        # Storage comes first: a checkpoint there makes one on the nodes needless.
        for tier, interval in self._intervals.items():
            if interval == "auto":
                is_due = self._auto_due[tier]
            else:
                is_due = interval > 0 and step % interval == 0

            if is_due:
                return tier

        return None

    def save(
        self,
        tier: Tier,
        progress: Progress,
        metrics: dict[str, float],
        evaluation: dict[str, float],
        wait: bool,
    ) -> bool:
        """Save; return whether this step is committed in storage now.

        Args:
            tier: where to.
            progress: progress of the run at this step.
            metrics: passed to `Callback.on_checkpoint_committed`.
            evaluation: stored with the checkpoint.
            wait: wait for the save, else it may run in the background.
        """
        components = self._components
        components.time_ledger.start_save(progress.step)
        self._context.callbacks.on_progress()
        in_background = self._section.background and not wait

        # The wait for another save is part of what this one costs.
        start_s = time.perf_counter()
        current = components.manager.save_in_progress
        if current is not None:
            if in_background and self._is_left_out(tier, current, progress.step):
                return False

            # One save at a time, so that host memory holds at most one copy of the state.
            self.settle()
            if in_background and components.world.rank == 0:
                log.warning(
                    "the save at step %d waited %.1f s for the previous one; %s is shorter than a "
                    "save takes",
                    progress.step,
                    time.perf_counter() - start_s,
                    self._interval_setting(tier),
                )

        request = self._request(tier, progress, evaluation)
        self._metrics = {"step": float(progress.step), **metrics}
        if in_background:
            components.manager.start_save(components.engine, request)
            self._record_start(tier, start_s)
            return False

        # After a stop or the last step, no later save would make up for one that failed.
        with retry_limit(CRITICAL_ATTEMPTS):
            outcome = components.manager.save(components.engine, request)

        self._record_start(tier, start_s)
        return self._handle_outcome(outcome)

    def _request(self, tier: Tier, progress: Progress, evaluation: dict[str, float]) -> SaveRequest:
        components = self._components

        # Local checkpoints disappear, so their rows stay for the next one in storage. Rows that
        # were taken for a save that fails are restored (`_handle_outcome`).
        rows = self._ledger.rows() if tier is Tier.LOCAL else self._ledger.take()

        # An attempt that resumes from the checkpoint needs the metrics of all steps before it.
        metrics_written = None
        if components.metrics is not None:
            metrics_written = components.metrics.flush()

        return SaveRequest(
            self._name,
            type(components.engine).__name__,
            progress,
            rows,
            components.tensors,
            components.aliases,
            dict(evaluation),
            tier,
            metrics_written,
            components.loader.cursors(),
        )

    def _record_start(self, tier: Tier, start_s: float) -> None:
        if tier in self._auto:
            self._auto[tier].record_start(self.trained_s, time.perf_counter() - start_s)

    def _is_left_out(self, tier: Tier, current: SaveRequest, step: int) -> bool:
        """Return whether a save is left out because `current` is still being written."""
        if tier is Tier.LOCAL and current.tier is Tier.STORAGE:
            return True  # the one on its way to storage is as good

        if tier is current.tier and self._section.when_busy == "skip":
            log.warning(
                "no checkpoint at step %d: the previous one is still being written; %s is shorter "
                "than a save takes",
                step,
                self._interval_setting(tier),
            )
            return True

        return False

    def _interval_setting(self, tier: Tier) -> str:
        """Return the config field of the interval and its value."""
        prefix = "local_" if tier is Tier.LOCAL else ""
        return f"checkpoint.{prefix}every_steps={self._intervals.get(tier)}"

    def settle(self) -> None:
        """Wait for the end of the save in progress."""
        self._handle_outcome(self._components.manager.finish_save())

    def _handle_outcome(self, outcome: SaveOutcome | None) -> bool:
        """Call the callbacks; return whether a checkpoint was committed in storage.

        Where storage failed, training continues, except after the last step.
        """
        if outcome is None:
            return False

        # A save that failed took its time like any other, so its cost counts too.
        request, step = outcome.request, outcome.request.progress.step
        if request.tier in self._auto:
            self._auto[request.tier].cost.record_end()

        if outcome.problem is not None:  # the same on all ranks
            if request.tier is Tier.STORAGE:
                if step == self._total_steps:
                    raise outcome.problem
                self._ledger.restore(request.rows)

            log.warning("no checkpoint at step %d, training continues: %s", step, outcome.problem)
            return False

        if request.tier is Tier.LOCAL:
            self._context.callbacks.on_local_checkpoint_committed(step)
            return False

        self.url = outcome.url
        self._components.time_ledger.record_commit(step)
        self._context.callbacks.on_checkpoint_committed(outcome.url, self._metrics)
        return True
