"""When the run is saved, where to, and what is told of it.

Two kinds of checkpoints: in storage, and (if the config names a folder) on the workers' own nodes. Each is due every so
many steps, or `auto`: then rank 0 weighs what it measured, and its wish travels with the sum that each step makes.
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
FIRST_S = 60.0
"""`auto` saves for the first time after so many seconds: then it knows what it costs."""


class Auto:
    """One kind of checkpoint whose interval is `auto`."""

    def __init__(self, section: CheckpointSection, trained_s: float, num_failures: int) -> None:
        self._expected_s = section.failure_interval_s
        self._num_failures = num_failures
        self._saved_s = trained_s
        self.cost = SaveCost()

    def due(self, trained_s: float) -> bool:
        """Tell whether to save now."""
        failures_s = mean_time_between_failures_s(self._expected_s, trained_s, self._num_failures)
        best_s = self.cost.optimal_interval_s(failures_s)
        return trained_s - self._saved_s >= (
            min(FIRST_S, failures_s / 20) if best_s is None else best_s
        )

    def begun(self, trained_s: float, stalled_s: float) -> None:
        """Note that a save was begun."""
        self._saved_s = trained_s
        self.cost.record_start(stalled_s)


class Saver:
    """The saves of one attempt; all its calls are the same on all ranks.

    Attributes:
        url: the newest commit in storage; None before the first.
        trained_s: seconds all steps of the run took so far.
    """

    def __init__(
        self, config: RunConfig, components: Components, context: RunContext, total_steps: int, trained_s: float
    ) -> None:
        self._section = section = config.checkpoint
        self._name = config.run.name
        self._components = components
        self._context = context
        self._total_steps = total_steps
        self._ledger = LedgerBuffer()
        self._told: dict[str, float] = {}  # what the commit of the save under way is announced with
        self._every = {
            Tier.STORAGE: section.every_steps,
            **({Tier.LOCAL: section.local_every_steps} if section.local_folder else {}),
        }
        self._auto = {
            tier: Auto(section, trained_s, components.num_failures)
            for tier, every in self._every.items()
            if every == "auto"
        }
        self._wished = dict.fromkeys(Tier, False)
        self.trained_s = trained_s
        self.url: str | None = None

    def prepare(self, step: int) -> None:
        """Make the memory for saves in the background, if there will be any."""
        left = self._total_steps - step
        if self._section.background and any(
            every == "auto" or 0 < every < left for every in self._every.values()
        ):
            self._components.manager.prepare(self._components.engine)

    def flags(self) -> tuple[float, ...]:
        """Return what this rank adds to the sums `advance` takes."""
        wishes = (
            self._components.world.rank == 0
            and tier in self._auto
            and self._auto[tier].due(self.trained_s)
            for tier in Tier
        )
        return (*self._components.manager.save_flags(), *map(float, wishes))

    def advance(self, num_written: float, num_ended: float, *wishes: float) -> None:
        """Go on with the save under way, and note what is wished for."""
        self._wished = {tier: wish > 0 for tier, wish in zip(Tier, wishes, strict=True)}
        self._ended(self._components.manager.advance(num_written, num_ended))

    def after_step(self, step: int, batches: Sequence[Batch], seconds: float) -> None:
        """Note a step (from 0) that was done."""
        self._ledger.add(step, batches)
        self.trained_s += seconds
        draft = self._components.manager.save_in_progress
        for tier, auto in self._auto.items():
            if draft is None or draft.tier == tier:
                auto.cost.record_step(seconds, draft is not None)

    def due(self, step: int, last: bool) -> Tier | None:
        """Return where a checkpoint is due after `step` steps; None if none is due."""
        if last and self._section.at_end:
            return Tier.STORAGE
        return next(
            (
                tier
                for tier, every in self._every.items()
                if (self._wished[tier] if every == "auto" else every and step % every == 0)
            ),
            None,
        )

    def save(
        self,
        tier: Tier,
        progress: Progress,
        values: dict[str, float],
        evaluation: dict[str, float],
        now: bool,
    ) -> bool:
        """Save, in the background unless `now`; return whether this step is committed in storage by now.

        `values` are announced with the commit, `evaluation` is kept with it.
        """
        components = self._components
        components.time_ledger.start_save(progress.step)
        self._context.callbacks.on_progress()
        background, begun = self._section.background and not now, time.perf_counter()
        if components.manager.save_in_progress is not None:
            if background and self._passes(tier, components.manager.save_in_progress, progress.step):
                return False
            self.settle()
            if background and components.world.rank == 0:
                log.warning(
                    "the save at step %d waited %.1f s for the one before; %s is shorter than a save takes",
                    progress.step,
                    time.perf_counter() - begun,
                    self._interval(tier),
                )
        rows = self._ledger.rows() if tier is Tier.LOCAL else self._ledger.take()
        lines = components.metrics.flush() if components.metrics is not None else None
        draft = SaveRequest(
            self._name,
            type(components.engine).__name__,
            progress,
            rows,
            components.tensors,
            components.aliases,
            dict(evaluation),
            tier,
            lines,
        )  # who goes on from it must find the lines of all steps before
        self._told = {"step": float(progress.step), **values}
        if background:
            components.manager.start_save(components.engine, draft)
            self._begun(tier, begun)
            return False
        with retry_limit(CRITICAL_ATTEMPTS):
            outcome = components.manager.save(components.engine, draft)
        self._begun(tier, begun)
        return self._ended(outcome)

    def _begun(self, tier: Tier, begun: float) -> None:
        if tier in self._auto:
            self._auto[tier].begun(self.trained_s, time.perf_counter() - begun)

    def _passes(self, tier: Tier, other: SaveRequest, step: int) -> bool:
        """Tell whether a save that is due is left out, because another one is still being written."""
        if tier is Tier.LOCAL and other.tier is Tier.STORAGE:
            return True  # what is on its way to storage serves as well
        if tier is other.tier and self._section.when_busy == "skip":
            log.warning(
                "no checkpoint at step %d: the one before is still being written; %s is shorter than a save "
                "takes",
                step,
                self._interval(tier),
            )
            return True
        return False

    def _interval(self, tier: Tier) -> str:
        prefix = "node_" if tier is Tier.LOCAL else ""
        return f"checkpoint.{prefix}every_steps={self._every.get(tier)}"

    def settle(self) -> None:
        """Wait for the end of the save under way."""
        self._ended(self._components.manager.finish_save())

    def _ended(self, outcome: SaveOutcome | None) -> bool:
        """Tell the surroundings of a commit; where storage failed, training goes on (not at the end)."""
        if outcome is None:
            return False
        draft, step = outcome.request, outcome.request.progress.step
        if draft.tier in self._auto:
            self._auto[draft.tier].cost.record_end()
        if outcome.problem is not None:  # the same on all ranks
            if step == self._total_steps and draft.tier is Tier.STORAGE:
                raise outcome.problem
            if draft.tier is Tier.STORAGE:
                self._ledger.restore(draft.rows)
            log.warning("no checkpoint at step %d, training goes on: %s", step, outcome.problem)
            return False
        if draft.tier is Tier.LOCAL:
            self._context.callbacks.on_local_checkpoint_committed(step)
            return False
        self.url = outcome.url
        self._context.callbacks.on_checkpoint_committed(outcome.url, self._told)
        return True
