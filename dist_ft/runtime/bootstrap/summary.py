"""What a person reads of a run: what is about to run, how it ended, that it is complete."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dist_ft.checkpoint.manifest import Manifest
from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.task import TaskSection
from dist_ft.config.task_facts import task_class
from dist_ft.core.logs import redact
from dist_ft.core.world import World
from dist_ft.data.batching.stream_loader import StreamLoader
from dist_ft.planning import memory
from dist_ft.planning.batch import batch_arithmetic
from dist_ft.runtime.bootstrap import devices
from dist_ft.runtime.bootstrap.build_data import Loaders, TrainingLoader
from dist_ft.training.console import format_table
from dist_ft.training.result import Result

if TYPE_CHECKING:
    from dist_ft.model.trainable_model import TrainableModel


def at_start(
    run: ResolvedRun, module: TrainableModel, loaders: Loaders, world: World, start: str
) -> str:
    """Return the table shown before the first step.

    `start`: the step and attempt it starts from.
    """
    from dist_ft.model.trainable_model import parameters_by_name

    config, model = run.config, run.model

    # ZeRO-3 leaves a placeholder of no elements in place of a weight; `ds_numel` has its size.
    parameters = parameters_by_name(module).values()
    counts = [getattr(p, "ds_numel", p.numel()) for p in parameters]
    num_parameters = sum(counts)
    num_trainable = sum(n for n, p in zip(counts, parameters, strict=True) if p.requires_grad)

    engine = "plain PyTorch"
    if config.max_workers > 0:
        engine = f"DeepSpeed ZeRO-{config.zero.stage}"
    workers = "worker" if world.num_ranks == 1 else "workers"

    rows = [
        ("storage", redact(config.run_url)),
        (
            "model",
            f"{model.path} ({module.model.config.model_type}), {num_parameters:,} parameters, "
            f"{num_trainable:,} trainable{_tuning_method(config)}",
        ),
        *_task_row(run.task),
        ("device", devices.describe_device(config, world.num_ranks)),
        ("engine", f"{engine}, {model.dtype}, attention {model.attention}"),
        (
            "world",
            f"{world.num_ranks} {workers}, "
            f"{world.largest_share(config.num_lanes)} lanes on the busiest",
        ),
        *batch_arithmetic(config),
        ("data", _describe_data(loaders.training)),
        ("memory", memory_line(num_parameters, num_trainable, world.num_ranks, config)),
        ("start", start),
    ]

    return format_table(f"run {config.run.name}", rows)


def _describe_data(loader: TrainingLoader) -> str:
    """Return the order of the data, and what is known of its size."""
    if isinstance(loader, StreamLoader):
        layouts = loader.store.slices.layouts
        num_bytes = sum(layout.num_bytes for layout in layouts.values())
        num_blocks = sum(layout.num_blocks for layout in layouts.values())
        text = f"streamed, {num_bytes / 1e9:.2f} GB in {num_blocks:,} blocks"
        if loader.indexed is not None:
            index = loader.indexed.index
            text += f"; {len(index.shards):,} indexed shards of {index.num_samples:,} samples"
        return text

    index = loader.index
    return (
        f"indexed, {index.num_samples:,} samples, {index.total('num_tokens'):,} tokens, "
        f"{_count(loader.plan.num_steps_in_epochs(1), 'step')} per epoch"
    )


def _task_row(task: TaskSection) -> list[tuple[str, str]]:
    """Return the row of the task and its first labels; none for causal_lm."""
    if task_class(task.name).reads_formats:
        return []

    text, labels = task.name.replace("_", " "), task.labels
    if labels:
        shown = ", ".join(labels[:6])
        if len(labels) > 6:
            shown += ", ..."
        text += f": {shown} ({len(labels)} labels)"

    return [("task", text)]


def _tuning_method(config: RunConfig) -> str:
    method = config.tuning.method
    if method == "full":
        return ""
    if method == "lora":
        return f" (lora of rank {config.tuning.lora.rank})"
    return f" ({method})"


def memory_line(num_parameters: int, num_trainable: int, num_ranks: int, config: RunConfig) -> str:
    """Return the memory of weights, gradients and optimizer state on one worker."""
    # zero.stage has a default, but one process runs without DeepSpeed and shards nothing.
    stage = config.zero.stage if config.max_workers else 0
    state = memory.model_state_bytes(
        num_parameters, num_ranks, stage, config.model.dtype, config.optimizer.name, num_trainable
    )

    return f"{memory.describe_memory(state)}; activations come on top"


def at_end(config: RunConfig, result: Result) -> str:
    """Return the table shown after the last step."""
    rows = [("steps", f"{result.step} of {result.total_steps}")]
    if result.loss is not None:
        rows.append(("last training loss", f"{result.loss:.4f}"))

    before, after = result.evaluation_before, result.evaluation_after
    if before is not None and after is not None:
        change = (after / before - 1) * 100
        rows.append(("held-out loss", f"{before:.4f} before, {after:.4f} after ({change:+.1f} %)"))

    if result.data_wait_share is not None:
        rows.append(("waited for data", f"{result.data_wait_share:.1%} of the time of all steps"))
    if result.checkpoint:
        rows.append(("checkpoint", redact(result.checkpoint)))

    if config.storage.options:  # the URL alone cannot be read without them
        rows.append(
            (
                "next",
                "dist-ft export CONFIG.yaml --out DIR  (the config of this run: its storage has "
                "options)",
            )
        )
    else:
        rows.append(("next", f"dist-ft export {redact(config.run_url)} --out DIR"))

    return format_table(f"run {config.run.name}: done", rows)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def when_complete(config: RunConfig, manifest: Manifest, total_steps: int) -> str:
    """Return the line shown when a run has nothing left to do."""
    step = manifest.progress.step
    if step < total_steps:
        state = f"step {step} of {total_steps} is committed, where the run ended early"
        field = "evaluation.patience"
    else:
        state = f"step {step} of {total_steps} is committed"
        field = "schedule.steps"

    return f"run {config.run.name} is complete: {state}; raise {field} to continue, or export it"
