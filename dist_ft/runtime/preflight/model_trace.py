"""A run's model without its weights, as the planning arithmetic counts it.

Built from the model's config.json and traced on the meta device (`model.memory_trace`). No weights
are read.
"""

from __future__ import annotations

import fnmatch
import logging
import os
from typing import TYPE_CHECKING, Any

from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.tuning import PROMPT_METHODS
from dist_ft.config.task_facts import task_class
from dist_ft.core.logs import quiet_third_parties
from dist_ft.planning.memory import DecoderShape, activation_bytes
from dist_ft.planning.model_shape import LanePeaks, ModelShape, PeakBytes, WeightShape
from dist_ft.runtime.preflight.model_checks import task_with_any_labels

if TYPE_CHECKING:
    import torch

    from dist_ft.data.batch import Batch
    from dist_ft.model.trainable_model import TrainableModel

log = logging.getLogger("dist_ft.plan")


def trace_model(config: RunConfig, model_config: str | None = None) -> ModelShape:
    """Return the shape of a run's model, traced if its code can run without values.

    `model_config`: a config.json in place of the model's own.
    """
    from dist_ft.model.loading import meta_model
    from dist_ft.model.trainable_model import parameters_by_name

    quiet_third_parties()
    model = meta_model.build_meta_model(config, task_with_any_labels(config), model_config)
    module = _wrap_with_loss(model, config)

    parameters = parameters_by_name(module)
    weights = _weight_shapes(config, parameters)
    kind = model.config.model_type

    try:
        return _trace(module, config, kind, weights)
    except Exception as error:  # whatever a model's code raises when it reads values
        log.debug("not traced", exc_info=error)

    # Without a trace no order is known: count each weight as a module of its own.
    peak = PeakBytes(_estimate_activations(model, config), 0)
    one_by_one = tuple((number,) for number in range(len(weights)))
    peaks = LanePeaks(peak, peak)
    return ModelShape(kind, weights, one_by_one, peaks, peaks, traced=False)


def count_parameters(config: RunConfig, model_config: str | None = None) -> int | None:
    """Return the number of parameters of the run's model, counted from a config.json.

    None if that is not a given file or in a local folder: no hub and no bucket is queried. Raises
    ModelError for a config.json that cannot be understood.
    """
    from dist_ft.model.loading import meta_model
    from dist_ft.storage import filesystem

    path = config.model.path
    is_folder = filesystem.is_local(path) and os.path.isdir(filesystem.local_path(path))
    if model_config is None and not is_folder:
        return None

    quiet_third_parties()
    model = meta_model.build_meta_model(config, task_with_any_labels(config), model_config)
    return sum(p.numel() for p in model.parameters())


def _weight_shapes(
    config: RunConfig, parameters: dict[str, torch.nn.Parameter]
) -> tuple[WeightShape, ...]:
    from dist_ft.engine import optimizers

    exempt = config.optimizer.decay_exempt
    shapes = []
    for name, p in parameters.items():
        # Weights with and without decay are separate groups, and ZeRO partitions each group.
        is_exempt = any(fnmatch.fnmatchcase(name, pattern) for pattern in exempt)
        decays = optimizers.has_weight_decay(p.shape) and not is_exempt
        shapes.append(WeightShape(name, p.numel(), p.requires_grad, decays))

    return tuple(shapes)


def _trace(
    module: TrainableModel, config: RunConfig, kind: str, weights: tuple[WeightShape, ...]
) -> ModelShape:
    """Return the shape with the order and peaks of a real forward and backward pass."""
    from dist_ft.model import memory_trace

    on_cpu = config.cluster.gpus_per_worker == 0 and config.max_workers > 0

    # In training mode, because activation checkpointing and dropout change what is stored.
    inputs = module.train().prepare_inputs(_full_batch(config), "meta")

    number_of = {weight.name: number for number, weight in enumerate(weights)}
    order = []
    for names in memory_trace.trace_module_order(module, inputs):
        order.append(tuple(number_of[name] for name in names))

    def peaks(keep_gradients: bool) -> LanePeaks:
        forward, backward = memory_trace.trace_peaks(
            module, inputs, keep_gradients=keep_gradients, on_cpu=on_cpu
        )
        return LanePeaks(
            PeakBytes(forward.activations, forward.logits),
            PeakBytes(backward.activations, backward.logits),
        )

    # Under ZeRO-2 and 3 gradients leave as soon as they exist; else those of earlier lanes stay.
    return ModelShape(kind, weights, tuple(order), peaks(True), peaks(False))


def _wrap_with_loss(model: Any, config: RunConfig) -> TrainableModel:
    """Return the model with the run's loss; without it if the loss needs a tokenizer."""
    from dist_ft.model.loading.meta_model import BareModel
    from dist_ft.runtime.bootstrap.build_model import add_loss

    if task_class(config.task.name).reads_formats and config.task.objective != "minimum_risk":
        return add_loss(model, ResolvedRun.from_config(config))

    return BareModel(model)


def _full_batch(config: RunConfig) -> Batch:
    """Return a full micro-batch (B, T): every position is a target token, one sample a row."""
    import numpy as np

    from dist_ft.data.batch import Batch

    # `prepare_inputs` adds the virtual tokens to these rows.
    uses_prompt = config.tuning.method in PROMPT_METHODS
    num_virtual = config.tuning.prompt.tokens if uses_prompt else 0
    num_rows = config.batch.micro_batch
    num_tokens = config.batch.sequence_length - num_virtual

    # Any id serves: nothing is computed on the meta device.
    ids = np.ones((num_rows, num_tokens), dtype=np.int64)  # (B, T)
    positions = np.tile(np.arange(num_tokens, dtype=np.int64), (num_rows, 1))  # (B, T)

    return Batch(ids, ids, positions, np.zeros((0, 4), dtype=np.int64), 0)


def _estimate_activations(model: Any, config: RunConfig) -> int:
    """Return the bytes of activations of a decoder of this size."""
    decoder = model.config.get_text_config()
    hidden = decoder.hidden_size
    intermediate = getattr(decoder, "intermediate_size", None) or 4 * hidden

    # Of a mixture of experts, only those that a token passes through store activations for it.
    num_experts = getattr(decoder, "num_experts_per_tok", None) or 1
    shape = DecoderShape(
        num_layers=decoder.num_hidden_layers,
        hidden=hidden,
        intermediate=intermediate * num_experts,
        vocab=decoder.vocab_size,
    )
    return activation_bytes(
        shape,
        micro_batch=config.batch.micro_batch,
        sequence_length=config.batch.sequence_length,
        checkpointing=config.model.activation_checkpointing,
        dtype=config.model.dtype,
    )
