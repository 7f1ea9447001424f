"""The two tables a person reads: what is about to run, and how it ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dist_ft.checkpoint.manifest import Progress
from dist_ft.config.schema import RunConfig
from dist_ft.core.logs import redact
from dist_ft.core.world import World
from dist_ft.planning import memory
from dist_ft.planning.batch import batch_arithmetic
from dist_ft.runtime.bootstrap.build_data import Data
from dist_ft.training.console import table
from dist_ft.training.result import Result

if TYPE_CHECKING:
    from dist_ft.model.trainable_model import TrainableModel


def at_start(
    config: RunConfig,
    module: TrainableModel,
    data: Data,
    world: World,
    total_steps: int,
    progress: Progress,
    attempt: int,
) -> str:
    """Return the table shown before the first step."""
    from dist_ft.model.trainable_model import parameters_by_name

    parameters = parameters_by_name(module).values()
    counts = [getattr(p, "ds_numel", p.numel()) for p in parameters]
    learned = sum(n for n, p in zip(counts, parameters, strict=True) if p.requires_grad)
    index = data.training.index
    sharded = config.max_workers > 0
    engine = f"DeepSpeed ZeRO-{config.zero.stage}" if sharded else "plain PyTorch"
    start = f"step {progress.step} of {total_steps}" + (
        f" (attempt {attempt})" if attempt > 1 else ""
    )
    return table(
        f"run {config.run.name}",
        [
            ("storage", redact(config.run_url)),
            (
                "model",
                f"{config.model.path} ({module.model.config.model_type}), {sum(counts):,} parameters, "
                f"{learned:,} learned" + _method(config),
            ),
            *_task(config),
            ("engine", f"{engine}, {config.model.dtype}, attention {config.model.attention}"),
            (
                "world",
                f"{world.num_ranks} worker{'s' if world.num_ranks > 1 else ''}, "
                f"{world.largest_share(config.num_lanes)} lanes on the busiest",
            ),
            *batch_arithmetic(config),
            (
                "data",
                f"{index.num_samples:,} samples, {index.total('num_tokens'):,} tokens, "
                f"{data.training.plan.steps_of(1):,} steps an epoch",
            ),
            ("memory", memory_line(sum(counts), learned, world.num_ranks, config)),
            ("start", start),
        ],
    )


def _task(config: RunConfig) -> list[tuple[str, str]]:
    labels = config.task.labels
    shown = (
        f": {', '.join(labels[:6])}{', ...' if len(labels) > 6 else ''} ({len(labels)} labels)"
        if labels
        else ""
    )
    return (
        [("task", config.task.name.replace("_", " ") + shown)]
        if config.task.name != "causal_lm"
        else []
    )


def _method(config: RunConfig) -> str:
    lora = f" of rank {config.tuning.lora.rank}" if config.tuning.method == "lora" else ""
    return f" ({config.tuning.method}{lora})" if config.tuning.method != "full" else ""


def memory_line(num_parameters: int, num_learned: int, world_size: int, config: RunConfig) -> str:
    """Return what weights, gradients and optimizer state take on one worker (activations come on top)."""
    stage = config.zero.stage if config.max_workers else 0
    state = memory.model_state_bytes(
        num_parameters, world_size, stage, config.model.dtype, config.optimizer.name, num_learned
    )
    return f"{memory.summary(state)}; activations come on top"


def at_end(config: RunConfig, result: Result) -> str:
    """Return the table shown after the last step."""
    rows = [("steps", f"{result.step} of {result.total_steps}")]
    if result.loss is not None:
        rows.append(("last training loss", f"{result.loss:.4f}"))
    before, after = result.evaluation_before, result.evaluation_after
    if before is not None and after is not None:
        rows.append(
            (
                "held-out loss",
                f"{before:.4f} before, {after:.4f} after ({(after / before - 1) * 100:+.1f} %)",
            )
        )
    if result.data_wait_share is not None:
        rows.append(("waited for data", f"{result.data_wait_share:.1%} of the time of steps"))
    if result.checkpoint:
        rows.append(("checkpoint", redact(result.checkpoint)))
    if config.storage.options:  # without them the URL alone can not be read
        rows.append(
            (
                "next",
                "dist-ft export CONFIG.yaml --out DIR  (the config of this run: its storage has options)",
            )
        )
    else:
        rows.append(("next", f"dist-ft export {redact(config.run_url)} --out DIR"))
    return table(f"run {config.run.name}: done", rows)
