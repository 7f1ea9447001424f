"""The loop: read from top to bottom, this is what a run does.

Everything a step needs follows from its number: which samples (plan), which seeds (run seed, step, lane), which
learning rate (schedule). What a rank alone knows and all must act on (a request to stop) travels with the one small
all-reduce each step makes anyway.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from dist_ft import failpoints
from dist_ft.checkpoint.ledger import LedgerBuffer
from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.checkpoint.manifest import Progress, TensorInfo
from dist_ft.checkpoint.saves import Draft, Outcome
from dist_ft.config.schema import RunConfig
from dist_ft.data.batch import Batch
from dist_ft.data.loader import Loader
from dist_ft.data.order import mix
from dist_ft.engine import schedule
from dist_ft.engine.base import Engine, StepOutcome, even_out
from dist_ft.errors import Interrupted
from dist_ft.logs import redact
from dist_ft.patience import STUBBORN, attempts
from dist_ft.storage import Store
from dist_ft.train import anomaly
from dist_ft.train.anomaly import Judge
from dist_ft.train.clock import Clock
from dist_ft.train.console import progress_line
from dist_ft.train.evaluate import evaluate
from dist_ft.train.metrics import MetricsLog
from dist_ft.train.result import Hooks, Result
from dist_ft.train.stragglers import Stragglers
from dist_ft.world import Collectives, World, on_rank0

log = logging.getLogger("dist_ft.train")


@dataclass(frozen=True)
class Parts:
    """What `runtime.build` wired together."""

    engine: Engine
    loader: Loader
    evaluation: Loader | None
    manager: CheckpointManager
    metrics: MetricsLog | None
    world: World
    collectives: Collectives
    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    judge: Judge
    store: Store
    clock: Clock = field(default_factory=Clock)


class Trainer:
    """Trains from `progress` to the last step."""

    def __init__(self, config: RunConfig, parts: Parts, hooks: Hooks, progress: Progress, total_steps: int,
                 evaluation: dict[str, float]) -> None:
        self._config = config
        self._parts = parts
        self._hooks = hooks
        self._total_steps = total_steps
        self._ledger = LedgerBuffer()
        self._step = progress.step
        self._num_tokens = progress.num_tokens
        self._num_target_tokens = progress.num_target_tokens
        self._evaluation = dict(evaluation)
        self._loss: float | None = None
        self._waited_s = self._steps_s = 0.0
        self._sources = source_names(config)
        self._drawn = np.zeros(2 * len(self._sources))
        self._checkpoint: str | None = None
        self._told: dict[str, float] = {}  # what the commit of the save under way is announced with

    def run(self) -> Result:
        """Train to the end and return how it went; raises Interrupted after a checkpoint if asked to stop."""
        cfg, parts = self._config, self._parts
        lanes = parts.world.share(cfg.num_lanes)
        if self._step == 0 and cfg.evaluation.at_start:
            self._evaluate("before")
        parts.clock.to("start")
        if cfg.checkpoint.background and 0 < cfg.checkpoint.every_steps < self._total_steps - self._step:
            parts.manager.prepare(parts.engine)
        watch = Stragglers(parts.world, parts.collectives, parts.engine.device, cfg.log.straggler_steps)
        with closing(watch) as pace, closing(parts.loader.iterate(self._step, self._total_steps, lanes)) as stream:
            begun = time.perf_counter()
            parts.clock.to("data")
            for batches in stream:
                waited = time.perf_counter() - begun
                parts.clock.to("compute")
                stop = self._train_step(batches, begun, waited)
                parts.clock.to("other")
                found = pace.after_step(self._step, waited)
                if found and parts.metrics is not None:
                    parts.metrics.add(self._step, "pace", found)
                self._waited_s += waited
                self._steps_s += time.perf_counter() - begun
                last = self._step == self._total_steps
                if last and cfg.evaluation.at_end:
                    self._evaluate("after")
                elif _due(self._step, cfg.evaluation.every_steps):
                    self._evaluate("")
                saved = False
                if _due(self._step, cfg.checkpoint.every_steps) or (last and cfg.checkpoint.at_end) or stop:
                    saved = self._save(last or stop)
                if stop and not last:
                    raise self._interrupted(saved)
                begun = time.perf_counter()
                parts.clock.to("data")
        parts.clock.to("save")
        self._saved(parts.manager.settle())
        return self._result()

    def _train_step(self, batches: Sequence[Batch], begun: float, waited: float) -> bool:
        """Do one optimizer step; return whether some rank was asked to stop."""
        cfg, parts, step = self._config, self._parts, self._step
        self._hooks.beat()
        failpoints.hit("train.step", parts.world.rank)
        counts = [sum(b.num_target_tokens for b in batches), sum(b.num_tokens for b in batches),
                  self._hooks.should_stop(), *parts.manager.flags(), *by_source(batches, len(self._sources))]
        num_targets, num_tokens, stop, num_written, num_ended, *drawn = parts.collectives.sum(counts)
        self._saved(parts.manager.advance(num_written, num_ended))
        self._drawn += np.array(drawn)
        seeds = [mix(cfg.run.seed, step, batch.lane) for batch in batches]
        evened, seeds = even_out(batches, seeds, parts.world.largest_share(cfg.num_lanes))
        rate = cfg.optimizer.learning_rate * schedule.factor(cfg.schedule, step, self._total_steps)
        outcome = self._learn(evened, seeds, num_targets, rate)
        self._ledger.add(step, batches)
        self._step += 1
        self._num_tokens += int(num_tokens)
        self._num_target_tokens += int(num_targets)
        if _due(self._step, cfg.log.every_steps) or self._step == self._total_steps:
            self._report(outcome, num_targets, num_tokens, rate, begun, waited)
        return stop > 0

    def _learn(self, batches: Sequence[Batch], seeds: Sequence[int], num_targets: float, rate: float) -> StepOutcome:
        """Learn from the global batch, unless its loss or gradient is bad; return those, as all workers know them."""
        parts, step = self._parts, self._step
        loss_sum = parts.engine.accumulate(batches, seeds, max(1, int(num_targets)))
        (total,) = parts.collectives.sum([loss_sum])
        self._loss = loss = total / max(1.0, num_targets)
        reason = parts.judge.of_loss(step, loss)
        norm = parts.engine.update(rate, -1.0 if reason else parts.judge.most_norm())
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
        found = parts.collectives.all_gather(np.concatenate([batch.pieces[:, 0] for batch in batches]))
        samples = np.unique(np.concatenate(found))
        parts.judge.in_a_row += 1
        if section.action == "stop" or parts.judge.in_a_row > section.most_in_a_row:
            raise anomaly.stopped(section, step, reason, samples)
        first = max(0, step + 1 - section.rollback_steps) if section.action == "rollback" else step
        with attempts(STUBBORN):
            on_rank0(parts.world, parts.collectives,
                     lambda: anomaly.write_record(parts.store, range(first, step + 1), reason, samples))
        if parts.world.rank == 0:
            log.warning("step %d changes nothing: %s; its %d samples are passed over (%s)", step + 1, reason,
                        len(samples), parts.store.shown(f"{anomaly.FOLDER}/step-{step:09d}.json"))
        parts.judge.vetoed.update(range(first, step + 1))
        if section.action == "rollback":
            self._saved(parts.manager.settle())
            raise anomaly.RollBack

    def _report(self, outcome: StepOutcome, num_targets: float, num_tokens: float, rate: float, begun: float,
                waited: float) -> None:
        """Show the step."""
        self._parts.clock.to("other")
        seconds = time.perf_counter() - begun
        values = {"loss": outcome.loss_sum / max(1.0, num_targets), "learning_rate": rate,
                  "grad_norm": outcome.grad_norm, "step_s": seconds,
                  "data_wait_s": waited, "tokens_per_s": num_tokens / seconds, "num_target_tokens": num_targets}
        if self._parts.metrics is not None:
            self._parts.metrics.add(self._step, "train", values | self._source_metrics())
            left = seconds * (self._total_steps - self._step)
            self._hooks.console.progress(progress_line(self._step, self._total_steps, values, left))

    def _source_metrics(self) -> dict[str, float]:
        """Return sequences and tokens of each source since the last call, and its epoch; nothing with one source."""
        names, epochs = self._sources, self._parts.loader.plan.epochs_of(self._step)
        drawn, self._drawn = self._drawn, np.zeros_like(self._drawn)
        return {key: float(value) for i, name in enumerate(names) for key, value in (
            (f"sequences/{name}", drawn[2 * i]), (f"tokens/{name}", drawn[2 * i + 1]), (f"epoch/{name}", epochs[i]))}

    def _evaluate(self, label: str) -> None:
        """Evaluate if there is held-out data; `label` keeps the loss for the summary (before, after)."""
        parts = self._parts
        if parts.evaluation is None:
            return
        parts.clock.to("evaluation")
        values = evaluate(parts.engine, parts.evaluation, self._config.num_lanes, parts.world, parts.collectives,
                          self._hooks.beat)
        if label:
            self._evaluation[label] = values["loss"]
        if parts.metrics is not None:
            parts.metrics.add(self._step, "evaluation", values)
            self._hooks.console.say(f"held-out loss at step {self._step}: {values['loss']:.4f} "
                                    f"(perplexity {values['perplexity']:.2f})")

    def _save(self, last: bool) -> bool:
        """Save, in the background unless it is the `last` time; return whether this step is committed by now."""
        parts, section = self._parts, self._config.checkpoint
        parts.clock.saving(self._step)
        self._hooks.beat()
        background = section.background and not last
        if parts.manager.busy:
            if background and section.when_busy == "skip":
                log.warning("no checkpoint at step %d: the one before is still being written; "
                            "checkpoint.every_steps=%d is shorter than a save takes", self._step, section.every_steps)
                return False
            begun = time.perf_counter()
            self._saved(parts.manager.settle())
            if background and parts.world.rank == 0:
                log.warning("the save at step %d waited %.1f s for the one before; "
                            "checkpoint.every_steps=%d is shorter than a save takes",
                            self._step, time.perf_counter() - begun, section.every_steps)
        draft = Draft(self._config.run.name, type(parts.engine).__name__, self._progress(), self._ledger.take(),
                      parts.tensors, parts.aliases, dict(self._evaluation))
        self._told = {"step": float(self._step), **({"loss": self._loss} if self._loss is not None else {})}
        if parts.metrics is not None:
            parts.metrics.flush()  # before the commit: a run resumed from it must find the lines of all steps before
        if background:
            parts.manager.begin(parts.engine, draft)
            return False
        with attempts(STUBBORN):
            return self._saved(parts.manager.save(parts.engine, draft))

    def _progress(self) -> Progress:
        return Progress(step=self._step, optimizer_step=self._parts.engine.optimizer_step(),
                        num_tokens=self._num_tokens, num_target_tokens=self._num_target_tokens,
                        history=self._parts.judge.history)

    def _saved(self, outcome: Outcome | None) -> bool:
        """Tell the surroundings of a commit; where storage failed, training goes on (not at the end)."""
        if outcome is None:
            return False
        step = outcome.draft.progress.step
        if outcome.problem is not None:  # the same on all ranks
            if step == self._total_steps:
                raise outcome.problem
            self._ledger.put_back(outcome.draft.rows)
            log.warning("no checkpoint at step %d, training goes on: %s", step, outcome.problem)
            return False
        self._checkpoint = outcome.url
        self._hooks.committed(outcome.url, self._told)
        return True

    def _interrupted(self, saved: bool) -> Interrupted:
        """Return the error that says the run stopped as asked, and whether its last step is saved."""
        how = (f"it is saved as {redact(str(self._checkpoint))}; the same command goes on from there" if saved else
               "storage failed and nothing is saved at this step (the log says why); the same command goes on from the "
               "checkpoint before")
        return Interrupted(f"stopped at step {self._step} of {self._total_steps} as asked; {how}")

    def _result(self) -> Result:
        return Result(self._config.run_url, self._step, self._total_steps, self._loss,
                      self._evaluation.get("before"), self._evaluation.get("after"), self._checkpoint,
                      self._waited_s / self._steps_s if self._steps_s else None)


def source_names(config: RunConfig) -> list[str]:
    """Return what metrics call the sources of the training data; none where there is only one."""
    sources = config.data.train
    return [source.name or f"source-{i}" for i, source in enumerate(sources)] if len(sources) > 1 else []


def by_source(batches: Sequence[Batch], count: int) -> list[float]:
    """Return [sequences, tokens] of each of `count` sources in `batches`, flat."""
    found = np.zeros((count, 2))
    for batch in batches if count else ():
        np.add.at(found, batch.sources[:, 0], np.column_stack([np.ones(len(batch.sources)), batch.sources[:, 1]]))
    return found.reshape(-1).tolist()


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
