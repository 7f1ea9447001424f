"""The only place that wires things: config and world in, trained run out.

In order: the run is the same as before, data (errors in it are cheapest here), attempt number, newest checkpoint,
model, engine, weights checked, trainer. Every worker of every attempt goes through `run`; where the run stands is read
from its storage.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from contextlib import closing
from dataclasses import replace
from typing import Any

from dist_ft.checkpoint import discovery, initial_weights
from dist_ft.checkpoint.local_tier import LocalTier
from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.checkpoint.manifest import Manifest, Progress, parse_folder
from dist_ft.config.load import STORED, check_resume, resolved_yaml
from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.prompting import untrainable
from dist_ft.core import logs
from dist_ft.core.errors import ConfigError, DistFtError
from dist_ft.core.world import Collectives, World, collectives, on_rank0
from dist_ft.metrics import best
from dist_ft.model.loading.download import cache_folder
from dist_ft.runtime.bootstrap import network_check, summary
from dist_ft.runtime.bootstrap.build_data import Data, open_anchor, open_data
from dist_ft.runtime.bootstrap.build_model import (
    aliases,
    fill,
    open_engine,
    store_model,
    tensors,
    with_whole_head,
)
from dist_ft.runtime.bootstrap.fisher import measure
from dist_ft.runtime.bootstrap.watchdog import Watchdog
from dist_ft.storage import filesystem
from dist_ft.storage.filesystem import Store
from dist_ft.training.anomaly import AnomalyError, Judge, RollBack, vetoed_steps
from dist_ft.training.components import Parts
from dist_ft.training.held_out_generation import HeldOutTexts
from dist_ft.training.metrics_log import MetricsLog, read_metrics
from dist_ft.training.minimum_risk import MinimumRisk
from dist_ft.training.result import Result
from dist_ft.training.run_context import RunContext
from dist_ft.training.time_ledger import Clock, kept
from dist_ft.training.trackers import Trackers
from dist_ft.training.trainer import Trainer

log = logging.getLogger("dist_ft.run")


def run(config: RunConfig, world: World, context: RunContext) -> Result:
    """Train `config` in this worker from where the run stands to its end; a collective call."""
    clock = Clock()
    logs.setup_logging(world.rank, world.num_ranks, config.log.level, context.log_handler)
    filesystem.configure(config.storage.options)
    if world.num_ranks > config.num_lanes:
        raise ConfigError(
            [
                f"cluster.workers={world.num_ranks}: more than the {config.num_lanes} lanes (global_batch / "
                "micro_batch); use fewer workers or a larger batch.global_batch"
            ]
        )
    if world.num_ranks > 1 and config.max_workers == 0:
        raise ConfigError(
            [
                f"cluster.workers=0: means one process, and this is one of {world.num_ranks} (WORLD_SIZE); set "
                f"cluster.workers={world.num_ranks}, or start one process"
            ]
        )
    for line in untrainable(config.prompting):
        raise ConfigError([line])
    comms = collectives(world, config.cluster.collective_timeout_s)
    store = Store(config.run_url)
    on_rank0(world, comms, lambda: require_same_run(store, config))
    network_check.check(config, world, comms, store, context.previous_end)
    stored, config = config, initial_weights.resolve_initial_model(config, store, world, comms)
    data = open_data(config, store, world, comms)
    config = with_whole_head(data.config)
    try:
        total_steps = data.training.plan.total_steps(config.schedule)
        done = _complete(config, store, world, comms, total_steps)
        if done is not None:
            return _already_done(config, done, total_steps, store, context, world)
        attempt = on_rank0(world, comms, lambda: take_over(store, stored, world, context.previous_end))
        nodes = node_tier(config, store, world, comms)
        with (
            kept(clock, store, attempt, world),
            closing(
                CheckpointManager(store, config.checkpoint, world, comms, attempt, nodes)
            ) as manager,
        ):
            manifest = manager.find_latest()
            return _train(
                config,
                world,
                context,
                comms,
                store,
                attempt,
                data,
                manager,
                manifest,
                total_steps,
                clock,
            )
    finally:
        data.close()


def _train(
    config: RunConfig,
    world: World,
    context: RunContext,
    comms: Collectives,
    store: Store,
    attempt: int,
    data: Data,
    manager: CheckpointManager,
    manifest: Manifest | None,
    total_steps: int,
    clock: Clock,
) -> Result:
    """Train from a checkpoint, or from the pre-trained weights."""
    module, engine, new = open_engine(config, world, manifest is not None, data.tokenizer)
    try:
        manifest = fill(config, module, engine, manager, manifest, new)
        if manifest is None and config.tuning.anchor.method == "ewc":
            kept_data = open_anchor(config, data.tokenizer, store, world, comms)
            with closing(kept_data.store):
                measure(config, engine, kept_data, world, comms, context.callbacks.on_progress)
        on_rank0(world, comms, lambda: store_model(store, module, data.tokenizer))
        progress = manifest.progress if manifest else Progress(step=0, optimizer_step=0)
        clock.resume(progress.step)
        lines = on_rank0(world, comms, lambda: read_metrics(store, progress.step))
        metrics = _metrics(config, world, comms, store, lines, attempt)
        if world.rank == 0:
            context.console.say(
                summary.at_start(config, module, data, world, total_steps, progress, attempt)
            )
        judge = Judge(
            config.anomaly, progress.history, on_rank0(world, comms, lambda: vetoed_steps(store))
        )
        parts = Parts(
            engine,
            data.training,
            data.evaluation,
            manager,
            metrics,
            world,
            comms,
            tensors(module),
            aliases(module),
            judge,
            store,
            on_rank0(world, comms, lambda: discovery.num_failures(store, attempt)),
            clock,
            _evaluated(config, lines),
            HeldOutTexts.of(config, data.tokenizer),
            MinimumRisk.of(config, data.tokenizer),
        )
        try:
            with Watchdog(store, attempt, world, config.cluster.progress_timeout_s) as watchdog:

                result = _train_on(
                    config, parts, context.with_callback(watchdog), progress, total_steps, manifest
                )
        finally:
            if metrics is not None:
                metrics.close()
        if world.rank == 0:
            context.console.say(summary.at_end(config, result))
        return result
    finally:
        engine.close()


def _metrics(
    config: RunConfig,
    world: World,
    comms: Collectives,
    store: Store,
    lines: list[dict[str, Any]],
    attempt: int,
) -> MetricsLog | None:
    """Return rank 0's record of the run, and None elsewhere; what its trackers refuse is raised by all."""
    made: list[MetricsLog] = []

    def make() -> None:
        trackers = Trackers.open(
            config, store.url, cache_folder(config.data.cache_dir)
        )
        made.append(MetricsLog(store, lines, attempt, config.log.tensorboard, trackers))

    on_rank0(world, comms, make)
    return made[0] if made else None


def _train_on(
    config: RunConfig,
    parts: Parts,
    context: RunContext,
    progress: Progress,
    total_steps: int,
    manifest: Manifest | None,
) -> Result:
    """Train to the end; where numbers went bad and the config says so, go back to the newest checkpoint first."""
    gone_back: Counter[int] = Counter()
    while True:
        try:
            return Trainer(
                config, parts, context, progress, total_steps, manifest.evaluation if manifest else {}
            ).run()
        except RollBack:
            parts.clock.to("start")
            manifest = parts.manager.find_latest()
            if manifest is None:
                raise AnomalyError(
                    "anomaly.action=rollback: there is no checkpoint yet to go back to; the same "
                    "command begins again and passes the bad steps over; set "
                    "checkpoint.every_steps"
                ) from None
            manifest = parts.manager.load(manifest, parts.engine, parts.tensors)
            progress = manifest.progress
            gone_back[progress.step] += 1
            if gone_back[progress.step] > config.anomaly.most_in_a_row:
                raise AnomalyError(
                    f"anomaly.action=rollback: gone back to step {progress.step} more than "
                    f"{config.anomaly.most_in_a_row} times (anomaly.most_in_a_row); what was committed "
                    "is kept; look at the data, or lower optimizer.learning_rate"
                ) from None
            parts = replace(
                parts,
                judge=Judge(
                    config.anomaly, progress.history, parts.judge.vetoed, parts.judge.in_a_row
                ),
            )
            if parts.metrics is not None:
                parts.metrics.rewind(progress.step)
            parts.clock.rewind(progress.step)
            log.warning("back to step %d", progress.step)


def require_same_run(store: Store, config: RunConfig) -> None:
    """Raise ConfigError if the run exists with another identity (rank 0 only); log what else changed."""
    for change in check_resume(_mapping(store), config) if store.exists(STORED) else ():
        log.info(
            "since the run began, %s changed from %s to %s", change.path, change.old, change.new
        )


def take_over(store: Store, config: RunConfig, world: World, after: str = "") -> int:
    """Take an attempt number (rank 0 only): from here on no attempt before this one can commit.

    `after`, why the one before ended, is noted with it.

    As late as can be, but before the newest checkpoint is looked for: a second start by mistake that fails early must
    not cost the first one its work, and what this one goes on from must stay the newest.
    """
    number = discovery.start_attempt(store, world.num_ranks, after)
    store.write(STORED, resolved_yaml(config).encode())
    return number


def node_tier(config: RunConfig, store: Store, world: World, comms: Collectives) -> LocalTier | None:
    """Return where this worker's node keeps checkpoints of the run; None if the config has no such folder."""
    if not config.checkpoint.node_folder:
        return None
    key = hashlib.sha256(config.run_url.encode()).hexdigest()[
        :16
    ]  # runs of one name in two buckets stay apart
    here = Store(f"{config.checkpoint.node_folder}/{config.run.name}-{key}")
    stage = f"zero-{config.zero.stage}" if config.max_workers else "plain"
    return LocalTier(store, here, f"{stage}, {world.num_ranks} workers", world, comms)


def _complete(
    config: RunConfig, store: Store, world: World, comms: Collectives, total_steps: int
) -> Manifest | None:
    """Return the checkpoint of the last step, if it is committed and sound; takes no attempt number.

    The last step may be one the run ended early at.
    """
    names = on_rank0(world, comms, lambda: discovery.list_committed(store))
    step = (parse_folder(names[0]) or (0, 0))[0] if names else 0
    if not names or (
        step < total_steps and not on_rank0(world, comms, lambda: _ended_early(config, store, step))
    ):
        return None
    try:
        manifest = discovery.load_manifest(store, names[0])
        discovery.verify_checksums(store, manifest, world)
    except DistFtError:
        manifest = None  # `CheckpointManager.find_latest` says why
    return manifest if all(comms.all_gather(manifest is not None)) else None


def _evaluated(config: RunConfig, lines: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, value) of checkpoint.best_by at every evaluation among the lines of metrics."""
    metric = config.checkpoint.best_by
    found = {
        line["step"]: line[metric]
        for line in lines
        if line["kind"] == "evaluation" and metric in line
    }
    return sorted((step, float("nan") if value is None else value) for step, value in found.items())


def _ended_early(config: RunConfig, store: Store, step: int) -> bool:
    """Tell whether the run's newest step is one that early stopping ended it at (rank 0 only)."""
    if not config.evaluation.patience:
        return False
    told = _evaluated(config, read_metrics(store, step))
    return (
        bool(told)
        and told[-1][0] == step
        and best.is_over(config.checkpoint.best_by, told, config.evaluation.patience)
    )


def _mapping(store: Store) -> dict[str, Any]:
    """Return the stored config as a plain mapping."""
    import yaml

    return yaml.safe_load(store.read(STORED))


def _already_done(
    config: RunConfig,
    manifest: Manifest,
    total_steps: int,
    store: Store,
    context: RunContext,
    world: World,
) -> Result:
    """Return the result of a run that has nothing left to do."""
    if world.rank == 0:
        early = manifest.progress.step < total_steps
        context.console.say(
            f"run {config.run.name} is complete: step {manifest.progress.step} of {total_steps} is "
            f"committed{', where it ended early' if early else ''}; raise "
            f"{'evaluation.patience' if early else 'schedule.steps'} to go on, or export it"
        )
    return Result(
        config.run_url,
        manifest.progress.step,
        total_steps,
        None,
        manifest.evaluation.get("before"),
        manifest.evaluation.get("after"),
        discovery.checkpoint_store(store, manifest).url,
    )
