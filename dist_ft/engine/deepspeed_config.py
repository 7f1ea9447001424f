"""The DeepSpeed config of a run: a pure function of the run's config.

DeepSpeed sees one micro-batch and no accumulation: dist_ft sets the boundary of each step itself, because workers may
run unequal numbers of lanes. Keys of `zero.deepspeed` are merged last; those dist_ft owns are refused by `validate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_ft.config.schema import RunConfig

NEVER = 2**62
BUCKET_ELEMENTS = 2**26
"""Elements a reduction at once; DeepSpeed's own default of 5e8 costs a small model more than its weights."""


def build_deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """Return the dictionary `deepspeed.initialize` takes."""
    zero: dict[str, Any] = {"stage": config.zero.stage}
    if config.zero.stage:
        zero["overlap_comm"] = config.cluster.gpus_per_worker > 0
        zero["contiguous_gradients"] = True
        zero["reduce_bucket_size"] = zero["allgather_bucket_size"] = BUCKET_ELEMENTS
    for part in ("optimizer", "param"):
        device = getattr(config.zero, f"offload_{part}")
        if device != "none":
            zero[f"offload_{part}"] = {
                "device": device,
                "pin_memory": config.cluster.gpus_per_worker > 0,
            }
            if device == "nvme":
                zero[f"offload_{part}"]["nvme_path"] = config.zero.nvme_path
    ours = {
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
    return merge(ours, config.zero.deepspeed)


def merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `extra` laid over it, mapping by mapping."""
    merged = dict(base)
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged
