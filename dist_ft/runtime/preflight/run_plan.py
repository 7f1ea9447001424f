"""What a run will need before any of it exists: batch, memory by kind, bytes on the wire, checkpoints, GPUs.

From the config and the model's config.json: the model's own code is rehearsed on the meta device
(`model.rehearsal`), the rest is arithmetic (`plan`). No weights are read, no GPU is needed, nothing
is written.
"""

from __future__ import annotations

import fnmatch
import os
from typing import TYPE_CHECKING, Any

from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.tuning import PROMPT_METHODS
from dist_ft.core.errors import ConfigError
from dist_ft.engine import deepspeed_config
from dist_ft.planning import gpus, traffic, worker_memory
from dist_ft.planning.batch import batch_arithmetic
from dist_ft.planning.memory import DecoderShape, activation_bytes
from dist_ft.planning.model_shape import LanePeaks, ModelShape, PeakBytes, WeightShape
from dist_ft.runtime.preflight.model_checks import task_with_any_labels

if TYPE_CHECKING:
    from dist_ft.model.trainable_model import TrainableModel


def plan(
    config: RunConfig,
    *,
    model_config: str | None = None,
    gpu: str | None = None,
    num_gpus: int | None = None,
) -> dict[str, Any]:
    """Return what `as_text` shows, as plain values: bytes, counts, names.

    Args:
        config: the run.
        model_config: a config.json in place of the model's own.
        gpu: one of `gpus.GPUS`, in any spelling; none: all of them.
        num_gpus: workers in place of cluster.workers.

    Raises ConfigError or ModelError, one clear line, for what can not be planned.
    """
    chosen = [gpus.canonical_name(gpu)] if gpu is not None else list(gpus.GPUS)
    config = _with_workers(config, num_gpus)
    shape = shape_of(config, model_config)
    zero = {
        "reduce_bucket_size": deepspeed_config.BUCKET_ELEMENTS,
        **deepspeed_config.build_deepspeed_config(config)["zero_optimization"],
    }
    world = max(1, config.max_workers)
    now = worker_memory.worker_setup(config, zero, world)
    return {
        "run": config.run.name,
        "model": {
            "path": config.model.path,
            "kind": shape.kind,
            "parameters": shape.num_parameters,
            "learned": shape.num_trainable,
            "rehearsed": shape.traced,
        },
        "batch": dict(batch_arithmetic(config)),
        "workers": world,
        "fewest_workers": max(1, config.min_workers),
        "stage": now.stage,
        "dtype": config.model.dtype,
        "memory": [_row(shape, setup, setup == now) for setup in _setups(config, zero, world)],
        "on_fewest_workers": worker_memory.peak_memory(
            shape, worker_memory.worker_setup(config, zero, max(1, config.min_workers))
        ).total,
        "checkpoint_copy": config.checkpoint.background
        and traffic.checkpoint_bytes(shape, now)["per_worker"],
        "checkpoint": traffic.checkpoint_bytes(shape, now),
        "kept": config.checkpoint.keep_last,
        "gpus": [_gpu(name, shape, config, zero, now) for name in chosen],
    }


def _with_workers(config: RunConfig, num_gpus: int | None) -> RunConfig:
    """Return the config with so many workers, each with a GPU."""
    if num_gpus is None:
        return config
    if not 1 <= num_gpus <= config.num_lanes:
        raise ConfigError(
            [
                f"--gpus={num_gpus}: from 1 to the {config.num_lanes} lanes of a step (batch.global_batch / "
                "batch.micro_batch) are allowed, a worker needs one at least; give another number, or a "
                "larger batch.global_batch"
            ],
            "plan",
        )
    cluster = config.cluster.model_copy(update={"workers": num_gpus, "gpus_per_worker": 1})
    return config.model_copy(update={"cluster": cluster})


def shape_of(config: RunConfig, model_config: str | None = None) -> ModelShape:
    """Return the model of a run as `plan` counts it, rehearsed where its code can be."""
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.engine import optimizers
    from dist_ft.model import memory_trace
    from dist_ft.model.loading import meta_model
    from dist_ft.model.trainable_model import parameters_by_name

    quiet_third_parties()
    model = meta_model.build_meta_model(config, task_with_any_labels(config), model_config)
    module = _learner(model, config)
    parameters = parameters_by_name(module)
    exempt = config.optimizer.decay_exempt
    weights = tuple(
        WeightShape(
            name,
            p.numel(),
            p.requires_grad,
            optimizers.has_weight_decay(p.shape)
            and not any(fnmatch.fnmatchcase(name, pattern) for pattern in exempt),
        )
        for name, p in parameters.items()
    )
    places = {name: place for place, name in enumerate(parameters)}
    on_cpu = config.cluster.gpus_per_worker == 0 and config.max_workers > 0
    try:
        inputs = module.train().prepare_inputs(_batch(config), "meta")
        order = tuple(
            tuple(places[name] for name in names)
            for names in memory_trace.trace_module_order(module, inputs)
        )
        added, passed = (
            LanePeaks(
                *(
                    PeakBytes(peak.activations, peak.logits)
                    for peak in memory_trace.trace_peaks(
                        module, inputs, keep_gradients=keep, on_cpu=on_cpu
                    )
                )
            )
            for keep in (True, False)
        )
    except Exception as error:  # code that looks at values can not be rehearsed: whatever it raises
        from logging import getLogger

        getLogger("dist_ft.plan").debug("not rehearsed", exc_info=error)
        held = PeakBytes(_estimated(model, config), 0)
        return ModelShape(
            model.config.model_type,
            weights,
            tuple((place,) for place in range(len(weights))),
            LanePeaks(held, held),
            LanePeaks(held, held),
            traced=False,
        )
    return ModelShape(model.config.model_type, weights, order, added, passed)


def count_parameters(config: RunConfig, model_config: str | None = None) -> int | None:
    """Return how many parameters the run's model has, counted from a config.json.

    None where none is at hand.

    At hand are a file that is given and a folder here: neither a hub nor a bucket is asked. Raises
    ModelError for one that can not be understood.
    """
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.model.loading import meta_model
    from dist_ft.storage import filesystem

    path = config.model.path
    if model_config is None and not (
        filesystem.is_local(path) and os.path.isdir(filesystem.local_path(path))
    ):
        return None
    quiet_third_parties()
    return sum(
        p.numel()
        for p in meta_model.build_meta_model(
            config, task_with_any_labels(config), model_config
        ).parameters()
    )


def _learner(model: Any, config: RunConfig) -> TrainableModel:
    """Return the model with the run's loss around it.

    Where that needs a tokenizer, its outputs alone.
    """
    from dist_ft.model.loading.meta_model import BareModel
    from dist_ft.runtime.bootstrap.build_model import add_loss

    plain = config.task.name == "causal_lm" and config.task.objective != "minimum_risk"
    return add_loss(model, ResolvedRun.from_config(config)) if plain else BareModel(model)


def _batch(config: RunConfig) -> Any:
    """Return a full micro-batch: every position holds a token and is learned, one sample a row."""
    import numpy as np

    from dist_ft.data.batch import Batch

    virtual = config.tuning.prompt.tokens if config.tuning.method in PROMPT_METHODS else 0
    rows, tokens = config.batch.micro_batch, config.batch.sequence_length - virtual
    ids = np.ones((rows, tokens), dtype=np.int64)
    places = np.tile(np.arange(tokens, dtype=np.int64), (rows, 1))
    return Batch(ids, ids, places, np.zeros((0, 4), dtype=np.int64), 0)


def _estimated(model: Any, config: RunConfig) -> int:
    inner = model.config.get_text_config()
    hidden = inner.hidden_size
    wide = getattr(inner, "intermediate_size", None) or 4 * hidden
    experts = getattr(inner, "num_experts_per_tok", None) or 1
    shape = DecoderShape(
        num_layers=inner.num_hidden_layers,
        hidden=hidden,
        intermediate=wide * experts,
        vocab=inner.vocab_size,
    )
    return activation_bytes(
        shape,
        micro_batch=config.batch.micro_batch,
        sequence_length=config.batch.sequence_length,
        checkpointing=config.model.activation_checkpointing,
        dtype=config.model.dtype,
    )


def _setups(config: RunConfig, zero: dict[str, Any], world: int) -> list[worker_memory.WorkerSetup]:
    """Return the run as it is and at every other stage; with offload, also as it is without."""
    now = worker_memory.worker_setup(config, zero, world)
    stages = [worker_memory.worker_setup(config, zero, world, stage) for stage in range(4)]
    stages[now.stage] = now
    without = worker_memory.worker_setup(config, zero, world, offload=False)
    return stages + ([without] if without != now else [])


def _row(shape: ModelShape, setup: worker_memory.WorkerSetup, chosen: bool) -> dict[str, Any]:
    memory, moved = worker_memory.peak_memory(shape, setup), traffic.step_traffic(shape, setup)
    offload = {
        name: value
        for name, value in (
            ("optimizer", setup.offload_optimizer),
            ("weights", setup.offload_param),
        )
        if value != "none"
    }
    return {
        "stage": setup.stage,
        "plain": setup.plain,
        "chosen": chosen,
        "offload": offload,
        "gpu": memory.gpu,
        "total": memory.total,
        "when": memory.when,
        "host": memory.host,
        "elements": moved.elements,
        "sent_bytes": moved.sent_bytes,
        "sent_by_deepspeed_bytes": moved.sent_by_deepspeed_bytes,
    }


def _gpu(
    name: str,
    shape: ModelShape,
    config: RunConfig,
    zero: dict[str, Any],
    now: worker_memory.WorkerSetup,
) -> dict[str, Any]:
    """Return whether the run fits on such GPUs, and the fewest it takes: as it is, and at the best stage."""
    usable_bytes = gpus.usable_bytes(name)

    def need(stage: int | None) -> Any:
        return lambda world: (
            worker_memory.peak_memory(
                shape, worker_memory.worker_setup(config, zero, world, stage)
            ).total
        )

    most = config.num_lanes if config.max_workers else 1
    used = worker_memory.peak_memory(shape, now).total
    found = {
        stage: gpus.fewest_workers(need(stage), config.num_lanes, usable_bytes)
        for stage in (0, 1, 2, 3)
        if stage or config.model.dtype == "float32"
    }
    least = min(
        ((count, stage) for stage, count in found.items() if count is not None), default=None
    )
    return {
        "name": name,
        "gb": gpus.GPUS[name],
        "room": usable_bytes,
        "fits": used <= usable_bytes,
        "used": used / (gpus.GPUS[name] * 1e9),
        "fewest": gpus.fewest_workers(need(None), most, usable_bytes),
        "least": {"gpus": least[0], "stage": least[1], "nodes": -(-least[0] // gpus.GPUS_PER_NODE)}
        if least
        else None,
    }
