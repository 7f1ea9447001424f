"""The only place that wires things: config and world in, trained run out.

In order: the run is the same as before, resolved run, data (errors in it are cheapest here),
attempt number, latest checkpoint, model, engine, weights checked, trainer. Every worker of every
attempt goes through `run`; where the run stands is read from its storage.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.checkpoint.manifest import Manifest, Progress, cursors_of
from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.prompting import untrainable_problems
from dist_ft.core import logs
from dist_ft.core.errors import ConfigError
from dist_ft.core.world import Collectives, World, collectives, on_rank0
from dist_ft.model.loading.download import cache_root
from dist_ft.planning.run_limits import RunLimits
from dist_ft.runtime.bootstrap import network_check, summary
from dist_ft.runtime.bootstrap.build_data import Loaders, build_anchor_loader, build_loaders
from dist_ft.runtime.bootstrap.build_model import (
    BuiltModel,
    build_engine,
    load_weights,
    store_model,
    tensor_infos,
    tied_weights,
)
from dist_ft.runtime.bootstrap.fisher import measure_fisher_information
from dist_ft.runtime.bootstrap.resolve_run import resolve_grown_head, resolve_run
from dist_ft.runtime.bootstrap.run_state import (
    build_local_tier,
    evaluation_history,
    find_final_checkpoint,
    find_local_attempt,
    require_same_data,
    require_same_run,
    start_attempt,
)
from dist_ft.runtime.bootstrap.run_usage import require_time_left
from dist_ft.runtime.bootstrap.watchdog import Watchdog
from dist_ft.storage import filesystem
from dist_ft.storage.filesystem import Store
from dist_ft.training.anomaly import (
    AnomalyDetector,
    AnomalyError,
    RollbackRequested,
    read_skipped_steps,
)
from dist_ft.training.components import Components
from dist_ft.training.held_out_generation import HeldOutGenerator
from dist_ft.training.metrics_log import MetricsLog, read_metrics
from dist_ft.training.minimum_risk import MinimumRisk
from dist_ft.training.result import Result
from dist_ft.training.run_context import RunContext
from dist_ft.training.time_ledger import TimeLedger, write_periodically
from dist_ft.training.trackers import Trackers
from dist_ft.training.trainer import Trainer

log = logging.getLogger("dist_ft.run")


@dataclass(frozen=True)
class _Attempt:
    """One attempt at a run, in this worker.

    Attributes:
        number: number of the attempt, from 1.
        clock: what this process spends its time on.
        total_steps: number of steps of the run.
        limits: limits of the run's time and cost.
    """

    run: ResolvedRun
    world: World
    collectives: Collectives
    store: Store
    context: RunContext
    number: int
    loaders: Loaders
    manager: CheckpointManager
    time_ledger: TimeLedger
    total_steps: int
    limits: RunLimits


def run(config: RunConfig, world: World, context: RunContext) -> Result:
    """Train `config` in this worker from where the run stands to its end; a collective call."""
    # First, because its clock starts here: everything below is time of this attempt.
    time_ledger = TimeLedger()
    restarted_s = time.time() if context.previous_end else None
    logs.setup_logging(world.rank, world.num_ranks, config.log.level, context.log_handler)
    filesystem.configure(config.storage.options)
    _require_possible(config, world)

    comms = collectives(world, config.cluster.group_timeout_s)
    store = Store(config.run_url)
    on_rank0(world, comms, lambda: require_same_run(store, config))

    # Before the first bulk transfer, so that a broken link is reported as one.
    network_check.check(config, world, comms, store, context.previous_end)

    # Errors that are cheap to find come first: in the data, then in the weights.
    resolved = resolve_run(config, store, world, comms)
    loaders = build_loaders(resolved, store, world, comms)
    try:
        resolved = resolve_grown_head(resolved)
        total_steps = loaders.training.plan.total_steps(config.schedule)

        # A complete run takes no attempt number: looking at it must not change it.
        final = find_final_checkpoint(config, store, world, comms, total_steps)
        if final is not None:
            if world.rank == 0:
                context.console.print(summary.when_complete(config, final, total_steps))
            return _complete_result(config, store, final, total_steps)

        limits = require_time_left(config, store, world, comms, restarted_s)

        # From here on no earlier attempt can commit, so the latest checkpoint stays the latest.
        local_tier = build_local_tier(config, store, world, comms)
        known = find_local_attempt(local_tier, comms)
        attempt = on_rank0(
            world, comms, lambda: start_attempt(store, config, world, context.previous_end, known)
        )
        manager = CheckpointManager(store, config.checkpoint, world, comms, attempt, local_tier)

        # The manager closes before the ledger ends, so that the time this takes is counted.
        with write_periodically(time_ledger, store, attempt, world), closing(manager):
            manifest = manager.find_latest()
            return _train(
                _Attempt(
                    run=resolved,
                    world=world,
                    collectives=comms,
                    store=store,
                    context=context,
                    number=attempt,
                    loaders=loaders,
                    manager=manager,
                    time_ledger=time_ledger,
                    total_steps=total_steps,
                    limits=limits,
                ),
                manifest,
            )
    finally:
        # Also after an error: the threads and processes that read ahead would outlive the run.
        loaders.close()


def _require_possible(config: RunConfig, world: World) -> None:
    """Raise ConfigError if these workers cannot train this config."""
    if world.num_ranks > config.num_lanes:
        raise ConfigError(
            [
                f"cluster.workers={world.num_ranks}: more workers than the {config.num_lanes} "
                f"lanes (global_batch / micro_batch). Use at most {config.num_lanes} workers or "
                "raise batch.global_batch."
            ]
        )

    # The plain engine exchanges no gradients: each process would train a model of its own.
    if world.num_ranks > 1 and config.max_workers == 0:
        raise ConfigError(
            [
                f"cluster.workers=0: means one process, and this is one of {world.num_ranks} "
                f"(WORLD_SIZE). Set cluster.workers={world.num_ranks}, or start one process."
            ]
        )

    for line in untrainable_problems(config.prompting):
        raise ConfigError([line])


def _train(attempt: _Attempt, manifest: Manifest | None) -> Result:
    """Train from the checkpoint of `manifest`, or from the pre-trained weights."""
    built = build_engine(attempt.run, attempt.world, resumed=manifest is not None)
    try:
        # Progress is that of the loaded checkpoint, which may be an older one than requested.
        manifest = _load_state(attempt, built, manifest)
        progress = manifest.progress if manifest else Progress(step=0, optimizer_step=0)
        attempt.time_ledger.record_resume(progress.step)

        components = _build_components(attempt, built, progress)
        try:
            if attempt.world.rank == 0:
                _show_start(attempt, built, progress)
            result = _train_under_watch(attempt, components, progress, manifest)
        finally:
            if components.metrics is not None:
                components.metrics.close()

        attempt.manager.require_folder()
        if attempt.world.rank == 0:
            attempt.context.console.print(summary.at_end(attempt.run.config, result))
        return result
    finally:
        built.engine.close()


def _load_state(attempt: _Attempt, built: BuiltModel, manifest: Manifest | None) -> Manifest | None:
    """Load weights and, on the first start, what is measured before step 1.

    Return the checkpoint that was loaded.
    """
    run, world, comms, store = attempt.run, attempt.world, attempt.collectives, attempt.store
    manifest = load_weights(run, built, attempt.manager, manifest)
    if manifest is not None and attempt.loaders.is_new:
        data, loaded = attempt.loaders.training, manifest
        on_rank0(world, comms, lambda: require_same_data(run.config, data, store, loaded))

    # Measured at the initial weights. A checkpoint has it as part of the optimizer state.
    if manifest is None and run.config.tuning.anchor.method == "ewc":
        loader = build_anchor_loader(run, store, world, comms)
        with closing(loader.store):
            measure_fisher_information(
                built.engine,
                loader,
                run.config.num_lanes,
                world,
                comms,
                attempt.context.callbacks.on_progress,
            )

    # Before training: a checkpoint can be exported only with the model's config and tokenizer.
    on_rank0(world, comms, lambda: store_model(store, built.module, run.tokenizer))
    attempt.manager.remember_stored_files()
    return manifest


def _build_components(attempt: _Attempt, built: BuiltModel, progress: Progress) -> Components:
    """Return what the training loop works with; a collective call."""
    run, world, comms, store = attempt.run, attempt.world, attempt.collectives, attempt.store

    # Lines after the checkpoint belong to steps that are about to be repeated.
    lines = on_rank0(world, comms, lambda: read_metrics(store, progress.step))
    metrics = _open_metrics_log(attempt, lines)

    # All ranks skip the same steps, or their weights would differ from then on.
    skipped_steps = on_rank0(world, comms, lambda: read_skipped_steps(store))
    detector = AnomalyDetector(run.config.anomaly, progress.history, skipped_steps)

    return Components(
        engine=built.engine,
        loader=attempt.loaders.training,
        evaluation=attempt.loaders.evaluation,
        manager=attempt.manager,
        metrics=metrics,
        world=world,
        collectives=comms,
        tensors=tensor_infos(built.module),
        aliases=tied_weights(built.module),
        anomaly_detector=detector,
        store=store,
        num_failures=on_rank0(world, comms, lambda: discovery.num_failures(store, attempt.number)),
        time_ledger=attempt.time_ledger,
        evaluations=evaluation_history(run.config, lines),
        held_out_generator=HeldOutGenerator.from_config(run.config, run.tokenizer),
        minimum_risk=MinimumRisk.from_config(run.config, run.tokenizer),
        limits=attempt.limits.with_trained(progress.trained_s),
    )


def _open_metrics_log(attempt: _Attempt, lines: list[dict[str, Any]]) -> MetricsLog | None:
    """Return rank 0's record of the run, and None elsewhere.

    If a tracker refuses, all ranks raise.
    """
    config, store = attempt.run.config, attempt.store

    # `on_rank0` sends a result to all ranks, and an open log cannot be sent: it stays in this list.
    opened: list[MetricsLog] = []

    def open_log() -> None:
        trackers = Trackers.open(config, store.url, cache_root(config.data.cache_dir))
        # Returns nothing: only the error of a tracker must reach the other ranks.
        opened.append(MetricsLog(store, lines, attempt.number, config.log.tensorboard, trackers))

    on_rank0(attempt.world, attempt.collectives, open_log)
    return opened[0] if opened else None


def _show_start(attempt: _Attempt, built: BuiltModel, progress: Progress) -> None:
    start = f"step {progress.step} of {attempt.total_steps}"
    if attempt.number > 1:
        start += f" (attempt {attempt.number})"
    table = summary.at_start(attempt.run, built.module, attempt.loaders, attempt.world, start)
    attempt.context.console.print(table)


def _train_under_watch(
    attempt: _Attempt, components: Components, progress: Progress, manifest: Manifest | None
) -> Result:
    """Train to the end, or until the watchdog ends this process because nothing progresses."""
    # Only now: loading takes minutes without a sign of progress.
    context, timeout_s = attempt.context, attempt.run.config.cluster.progress_timeout_s
    watch = Watchdog(attempt.store, attempt.number, attempt.world, timeout_s, context.on_hang)
    with watch as watchdog:
        context = context.with_callback(watchdog)
        return train_with_rollback(
            attempt.run, components, context, progress, attempt.total_steps, manifest
        )


def train_with_rollback(
    run: ResolvedRun,
    components: Components,
    context: RunContext,
    progress: Progress,
    total_steps: int,
    manifest: Manifest | None,
) -> Result:
    """Train to the end.

    On an anomaly under anomaly.action=rollback, reload the latest checkpoint and continue.

    Raises AnomalyError if there is no checkpoint, or after anomaly.max_consecutive rollbacks to the
    same one.
    """
    anomaly = run.config.anomaly
    rollbacks: Counter[int] = Counter()  # by the step rolled back to

    while True:
        evaluation = manifest.evaluation if manifest else {}

        # Streamed data continues where the lanes were at the checkpoint.
        components.loader.restore(progress.step, cursors_of(manifest))

        # A new trainer, because all it counts starts again from the checkpoint.
        trainer = Trainer(run, components, context, progress, total_steps, evaluation)
        try:
            return trainer.run()
        except RollbackRequested:
            # Every rank gets here: the values that make an anomaly are equal on all of them.
            components.time_ledger.enter("start")
            manifest = components.manager.find_latest()
            if manifest is None:
                raise AnomalyError(
                    "anomaly.action=rollback: the run has no checkpoint yet to roll back to. The "
                    "same command starts again and skips the bad steps. Set "
                    "checkpoint.every_steps."
                ) from None

            manifest = components.manager.load(manifest, components.engine, components.tensors)
            progress = manifest.progress

            # A later checkpoint means that the run got past the anomaly, so count by step.
            rollbacks[progress.step] += 1
            if rollbacks[progress.step] > anomaly.max_consecutive:
                raise AnomalyError(
                    f"anomaly.action=rollback: rolled back to step {progress.step} more than "
                    f"{anomaly.max_consecutive} times (anomaly.max_consecutive). All committed "
                    "checkpoints are kept. Look at the data, or lower optimizer.learning_rate."
                ) from None

            components = _rewound(components, run, progress)
            log.warning("rolled back to step %d", progress.step)


def _rewound(components: Components, run: ResolvedRun, progress: Progress) -> Components:
    """Return the components as they were at the checkpoint.

    The steps to skip are remembered.
    """
    before = components.anomaly_detector
    detector = AnomalyDetector(
        run.config.anomaly, progress.history, before.skipped_steps, before.num_consecutive
    )

    # The steps since the checkpoint are repeated: their metrics are dropped, their time was lost.
    if components.metrics is not None:
        components.metrics.rewind(progress.step)
    components.time_ledger.rewind(progress.step)

    return replace(components, anomaly_detector=detector)


def _complete_result(
    config: RunConfig, store: Store, manifest: Manifest, total_steps: int
) -> Result:
    return Result(
        config.run_url,
        manifest.progress.step,
        total_steps,
        None,
        manifest.evaluation.get("before"),
        manifest.evaluation.get("after"),
        discovery.checkpoint_store(store, manifest).url,
    )
