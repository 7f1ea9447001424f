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
from dist_ft.checkpoint.save_interval import SaveCost, between_failures_s
from dist_ft.checkpoint.save_status import SaveOutcome, SaveRequest
from dist_ft.config.schema import CheckpointSection, RunConfig
from dist_ft.data.batch import Batch
from dist_ft.storage.retry import CRITICAL_ATTEMPTS, retry_limit
from dist_ft.training.components import Parts
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
        failures_s = between_failures_s(self._expected_s, trained_s, self._num_failures)
        best_s = self.cost.best_s(failures_s)
        return trained_s - self._saved_s >= (
            min(FIRST_S, failures_s / 20) if best_s is None else best_s
        )

    def begun(self, trained_s: float, stalled_s: float) -> None:
        """Note that a save was begun."""
        self._saved_s = trained_s
        self.cost.begun(stalled_s)


class Saver:
    """The saves of one attempt; all its calls are the same on all ranks.

    Attributes:
        url: the newest commit in storage; None before the first.
        trained_s: seconds all steps of the run took so far.
    """

    def __init__(
        self, config: RunConfig, parts: Parts, context: RunContext, total_steps: int, trained_s: float
    ) -> None:
        self._section = section = config.checkpoint
        self._name = config.run.name
        self._parts = parts
        self._context = context
        self._total_steps = total_steps
        self._ledger = LedgerBuffer()
        self._told: dict[str, float] = {}  # what the commit of the save under way is announced with
        self._every = {
            False: section.every_steps,
            **({True: section.node_every_steps} if section.node_folder else {}),
        }
        self._auto = {
            on_nodes: Auto(section, trained_s, parts.num_failures)
            for on_nodes, every in self._every.items()
            if every == "auto"
        }
        self._wished = {False: False, True: False}
        self.trained_s = trained_s
        self.url: str | None = None

    def prepare(self, step: int) -> None:
        """Make the memory for saves in the background, if there will be any."""
        left = self._total_steps - step
        if self._section.background and any(
            every == "auto" or 0 < every < left for every in self._every.values()
        ):
            self._parts.manager.prepare(self._parts.engine)

    def flags(self) -> tuple[float, ...]:
        """Return what this rank adds to the sums `advance` takes."""
        wishes = (
            self._parts.world.rank == 0
            and kind in self._auto
            and self._auto[kind].due(self.trained_s)
            for kind in (False, True)
        )
        return (*self._parts.manager.progress_flags(), *map(float, wishes))

    def advance(self, num_written: float, num_ended: float, *wishes: float) -> None:
        """Go on with the save under way, and note what is wished for."""
        self._wished = {kind: wish > 0 for kind, wish in zip((False, True), wishes, strict=True)}
        self._ended(self._parts.manager.advance(num_written, num_ended))

    def after_step(self, step: int, batches: Sequence[Batch], seconds: float) -> None:
        """Note a step (from 0) that was done."""
        self._ledger.add(step, batches)
        self.trained_s += seconds
        draft = self._parts.manager.save_in_progress
        for on_nodes, auto in self._auto.items():
            if draft is None or draft.on_nodes == on_nodes:
                auto.cost.step(seconds, draft is not None)

    def due(self, step: int, last: bool) -> bool | None:
        """Return whether a checkpoint is due after `step` steps: False in storage, True on the nodes, None for none."""
        if last and self._section.at_end:
            return False
        return next(
            (
                kind
                for kind, every in self._every.items()
                if (self._wished[kind] if every == "auto" else every and step % every == 0)
            ),
            None,
        )

    def save(
        self,
        on_nodes: bool,
        progress: Progress,
        values: dict[str, float],
        evaluation: dict[str, float],
        now: bool,
    ) -> bool:
        """Save, in the background unless `now`; return whether this step is committed in storage by now.

        `values` are announced with the commit, `evaluation` is kept with it.
        """
        parts = self._parts
        parts.clock.saving(progress.step)
        self._context.callbacks.on_progress()
        background, begun = self._section.background and not now, time.perf_counter()
        if parts.manager.save_in_progress is not None:
            if background and self._passes(on_nodes, parts.manager.save_in_progress, progress.step):
                return False
            self.settle()
            if background and parts.world.rank == 0:
                log.warning(
                    "the save at step %d waited %.1f s for the one before; %s is shorter than a save takes",
                    progress.step,
                    time.perf_counter() - begun,
                    self._interval(on_nodes),
                )
        rows = self._ledger.rows() if on_nodes else self._ledger.take()
        lines = parts.metrics.flush() if parts.metrics is not None else None
        draft = SaveRequest(
            self._name,
            type(parts.engine).__name__,
            progress,
            rows,
            parts.tensors,
            parts.aliases,
            dict(evaluation),
            on_nodes,
            lines,
        )  # who goes on from it must find the lines of all steps before
        self._told = {"step": float(progress.step), **values}
        if background:
            parts.manager.start_save(parts.engine, draft)
            self._begun(on_nodes, begun)
            return False
        with retry_limit(CRITICAL_ATTEMPTS):
            outcome = parts.manager.save(parts.engine, draft)
        self._begun(on_nodes, begun)
        return self._ended(outcome)

    def _begun(self, on_nodes: bool, begun: float) -> None:
        if on_nodes in self._auto:
            self._auto[on_nodes].begun(self.trained_s, time.perf_counter() - begun)

    def _passes(self, on_nodes: bool, other: SaveRequest, step: int) -> bool:
        """Tell whether a save that is due is left out, because another one is still being written."""
        if on_nodes and not other.on_nodes:
            return True  # what is on its way to storage serves as well
        if on_nodes == other.on_nodes and self._section.when_busy == "skip":
            log.warning(
                "no checkpoint at step %d: the one before is still being written; %s is shorter than a save "
                "takes",
                step,
                self._interval(on_nodes),
            )
            return True
        return False

    def _interval(self, on_nodes: bool) -> str:
        return f"checkpoint.{'node_' if on_nodes else ''}every_steps={self._every.get(on_nodes)}"

    def settle(self) -> None:
        """Wait for the end of the save under way."""
        self._ended(self._parts.manager.finish_save())

    def _ended(self, outcome: SaveOutcome | None) -> bool:
        """Tell the surroundings of a commit; where storage failed, training goes on (not at the end)."""
        if outcome is None:
            return False
        draft, step = outcome.request, outcome.request.progress.step
        if draft.on_nodes in self._auto:
            self._auto[draft.on_nodes].cost.written()
        if outcome.problem is not None:  # the same on all ranks
            if step == self._total_steps and not draft.on_nodes:
                raise outcome.problem
            if not draft.on_nodes:
                self._ledger.put_back(draft.rows)
            log.warning("no checkpoint at step %d, training goes on: %s", step, outcome.problem)
            return False
        if draft.on_nodes:
            self._context.callbacks.on_local_checkpoint_committed(step)
            return False
        self.url = outcome.url
        self._context.callbacks.on_checkpoint_committed(outcome.url, self._told)
        return True
