"""Builds the DeepSpeed config of a run from the run's config.

DeepSpeed sees one micro-batch and no accumulation: dist_ft sets the boundary of each step itself,
because workers may run unequal numbers of lanes. Keys of `zero.deepspeed` are merged last; the
config checks reject those that dist_ft sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_ft.config.schema import RunConfig

NEVER = 2**62

BUCKET_ELEMENTS = 2**26
"""Elements per reduction. DeepSpeed's default of 5e8 takes more memory than a small model."""


def build_deepspeed_config(config: RunConfig, swap_folder: str | None = None) -> dict[str, Any]:
    """Return the dictionary that `deepspeed.initialize` takes.

    Args:
        config: the run.
        swap_folder: folder for offload to nvme; None: zero.nvme_path itself.
    """
    uses_gpu = config.cluster.gpus_per_worker > 0
    zero: dict[str, Any] = {"stage": config.zero.stage}

    if config.zero.stage:
        # Communication overlaps with computation on a CUDA stream of its own; CPUs have none.
        zero["overlap_comm"] = uses_gpu
        zero["contiguous_gradients"] = True
        zero["reduce_bucket_size"] = zero["allgather_bucket_size"] = BUCKET_ELEMENTS
    _add_offload(zero, config, swap_folder or config.zero.nvme_path)

    # The optimizer is built by `optimizers`, so that all engines compute the same update. DeepSpeed
    # must accept a class it does not know, and must not require its own Adam under CPU offload.
    own_settings = {
        "train_micro_batch_size_per_gpu": config.batch.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }
    return merge(own_settings, config.zero.deepspeed)


def _add_offload(zero: dict[str, Any], config: RunConfig, swap_folder: str | None) -> None:
    """Add the settings that move optimizer state and parameters off the GPU."""
    uses_gpu = config.cluster.gpus_per_worker > 0
    for state in ("optimizer", "param"):
        device = getattr(config.zero, f"offload_{state}")
        if device != "none":
            # Pinned memory makes copies to a GPU asynchronous; without one it only takes memory.
            offload = {"device": device, "pin_memory": uses_gpu}
            if device == "nvme":
                offload["nvme_path"] = swap_folder
            zero[f"offload_{state}"] = offload


def merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` overridden by `extra`, recursively for nested mappings."""
    merged = dict(base)
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged
