"""Allowed keys of `zero.deepspeed`: all keys of DeepSpeed, except those that dist_ft sets itself.

A misspelled key is refused with the similar name; other unknown keys are passed through (DeepSpeed
may be newer than the lists). Pure.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from dist_ft.config.schema import RunConfig

# A test compares these lists with the installed DeepSpeed. Dots separate nested keys.
OWNED = {
    "train_batch_size": "Set batch.global_batch",
    "train_micro_batch_size_per_gpu": "Set batch.micro_batch",
    "gradient_accumulation_steps": "It follows from batch.global_batch and batch.micro_batch",
    "managed_gradient_accumulation": "dist_ft sets the boundary of each step itself",
    "optimizer": "Set optimizer.name and its fields",
    "scheduler": "Set schedule.name and its fields",
    "bf16": "Set model.dtype",
    "bfloat16": "Set model.dtype",
    "fp16": "Set model.dtype (float32 or bfloat16)",
    "amp": "Set model.dtype",
    "torch_autocast": "Set model.dtype",
    "gradient_clipping": "Set optimizer.max_grad_norm",
    "activation_checkpointing": "Set model.activation_checkpointing",
    "elasticity": "Set cluster.workers to a range, such as 1..4",
    "data_efficiency": "dist_ft orders the data itself (section data)",
    "curriculum_learning": "dist_ft orders the data itself (section data)",
    "zero_allow_untested_optimizer": "dist_ft sets it",
    "zero_force_ds_cpu_optimizer": "dist_ft sets it",
    "checkpoint": "dist_ft writes its own checkpoints (section checkpoint)",
    "tensorboard": "Set log.tensorboard",
    "zero_optimization.stage": "Set zero.stage",
    "zero_optimization.offload_optimizer.device": "Set zero.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "Set zero.nvme_path",
    "zero_optimization.offload_param.device": "Set zero.offload_param",
    "zero_optimization.offload_param.nvme_path": "Set zero.nvme_path",
    "zero_optimization.cpu_offload": "Set zero.offload_optimizer",
    "zero_optimization.cpu_offload_param": "Set zero.offload_param",
    "zero_optimization.elastic_checkpoint": "dist_ft writes its own checkpoints, for any size",
}
"""Keys that dist_ft sets, and what to do instead."""

# Only needed to recognize misspellings: other unknown keys are passed through.
KNOWN = frozenset(
    {
        "zero_optimization",
        "aio",
        "autotuning",
        "comms_logger",
        "communication_data_type",
        "compile",
        "compression_training",
        "csv_monitor",
        "data_types",
        "datastates_ckpt",
        "dataloader_drop_last",
        "disable_allgather",
        "dump_state",
        "disable_python_gc",
        "expert_parallel",
        "flops_profiler",
        "gradient_allreduce_op",
        "gradient_predivide_factor",
        "graph_harvesting",
        "hybrid_engine",
        "log_level",
        "memory_breakdown",
        "monitor_config",
        "nebula",
        "pipeline",
        "prescale_gradients",
        "quantize_training",
        "seq_parallel_communication_data_type",
        "sequence_parallel_size",
        "sparse_attention",
        "sparse_gradients",
        "steps_per_print",
        "tensor_parallel",
        "timers",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zenflow",
    }
)

KNOWN_ZERO = frozenset(
    {
        "contiguous_gradients",
        "reduce_scatter",
        "reduce_bucket_size",
        "use_multi_rank_bucket_allreduce",
        "allgather_partitions",
        "allgather_bucket_size",
        "overlap_comm",
        "compute_grad_norm",
        "load_from_fp32_weights",
        "offload_param",
        "offload_optimizer",
        "zenflow",
        "sub_group_size",
        "cpu_offload_use_pin_memory",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential",
        "stage3_gather_fp16_weights_on_model_save",
        "ignore_unused_parameters",
        "legacy_stage1",
        "round_robin_gradients",
        "parameter_alignment",
        "zero_hpz_partition_size",
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_gradients",
        "memory_efficient_linear",
        "pipeline_loading_checkpoint",
        "override_module_apply",
        "log_trace_cache_warnings",
        "enable_sanity_checks",
        "save_muon_momentum_buffer_in_memory",
        "leaf_module",
    }
)


def deepspeed_problems(config: RunConfig) -> Iterator[str]:
    """Yield a line for each key of `zero.deepspeed` that dist_ft sets or that is misspelled."""
    extra = config.zero.deepspeed
    for path in _paths(extra):
        if path in OWNED:
            yield (
                f"zero.deepspeed.{path}: dist_ft sets this key itself. Allowed: DeepSpeed keys "
                f"that it does not set. Remove it. {OWNED[path]}."
            )

    # Keys that dist_ft sets count as known: they have their line above, and are suggested for
    # misspelled ones.
    owned = {path for path in OWNED if "." not in path}
    yield from _misspelled(extra, "zero.deepspeed", KNOWN | owned)

    zero = extra.get("zero_optimization")
    if isinstance(zero, dict):
        owned_zero = {path.split(".")[1] for path in OWNED if path.startswith("zero_optimization.")}
        yield from _misspelled(zero, "zero.deepspeed.zero_optimization", KNOWN_ZERO | owned_zero)


def _paths(mapping: dict[str, object], prefix: str = "") -> Iterator[str]:
    """Yield the dotted paths of all keys, of nested mappings too."""
    for key, value in mapping.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")


def _misspelled(mapping: dict[str, object], path: str, known: frozenset[str]) -> Iterator[str]:
    # DeepSpeed ignores unknown top-level keys: a misspelled one would silently have no effect.
    # Sorted, as the answer must not depend on the order of a set.
    for key in mapping:
        similar = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.8)
        if key not in known and similar:
            yield f"{path}.{key}: no such key in DeepSpeed. Did you mean {similar[0]}?"
