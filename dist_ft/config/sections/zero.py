"""The section `zero`: how DeepSpeed shards the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from dist_ft.config.sections.section import Section


class ZeroSection(Section):
    """DeepSpeed ZeRO. Not used in one process (cluster.workers=0)."""

    # No field is part of the identity: checkpoints load at any stage, and without DeepSpeed.
    stage: Literal[0, 1, 2, 3] = Field(
        3,
        description=(
            "0: replicate everything; 1: shard optimizer state; 2: also gradients; 3: also weights."
        ),
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where optimizer state is offloaded to."
    )
    offload_param: Literal["none", "cpu", "nvme"] = Field(
        "none", description="stage 3: where weights are offloaded to."
    )
    nvme_path: str | None = Field(None, description="Local folder for offload to nvme.")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Further DeepSpeed keys, passed through; keys that dist_ft sets itself are refused."
        ),
    )


def _offload_stage(zero: ZeroSection) -> Iterator[str]:
    if zero.offload_param != "none" and zero.stage < 3:
        yield (
            f"zero.offload_param={zero.offload_param}: only sharded weights can be offloaded. "
            f"Needs zero.stage=3 (now {zero.stage}). Set zero.stage=3, or offload_param to none."
        )

    if zero.offload_optimizer != "none" and zero.stage < 1:
        yield (
            f"zero.offload_optimizer={zero.offload_optimizer}: only sharded optimizer state can be "
            "offloaded. Needs zero.stage 1, 2 or 3 (now 0). Set zero.stage=1, or "
            "offload_optimizer to none."
        )


def _offload_nvme(zero: ZeroSection) -> Iterator[str]:
    fields = []
    for field in ("offload_optimizer", "offload_param"):
        if getattr(zero, field) == "nvme":
            fields.append(field)

    if fields and not zero.nvme_path:
        yield (
            f"zero.{fields[0]}=nvme: zero.nvme_path is not set. A local folder on the disk is "
            "needed. Set zero.nvme_path."
        )

    # The swap of optimizer state to nvme is part of DeepSpeed's ZeRO-3 optimizer only.
    if "offload_optimizer" in fields and zero.stage < 3:
        yield (
            "zero.offload_optimizer=nvme: DeepSpeed offloads to nvme only at zero.stage=3 (now "
            f"{zero.stage}). Set zero.stage=3, or offload_optimizer=cpu."
        )


CHECKS = (_offload_stage, _offload_nvme)
