"""Describes a node: devices, cores, memory, versions.

For reports: no host name, no path, no user.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import TypedDict

PACKAGES = (
    "torch",
    "deepspeed",
    "ray",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "fsspec",
    "numpy",
    "flash-attn",
)


class GpuDescription(TypedDict):
    """One GPU.

    Attributes:
        processors: streaming multiprocessors.
    """

    name: str
    memory_gib: float
    capability: str
    processors: int


class NodeDescription(TypedDict, total=False):
    """A node, as JSON values. The versions of CUDA or HIP are missing if GPUs are not used."""

    os: str
    python: str
    cpus: int | None
    cpus_usable: int
    memory_gib: float
    versions: dict[str, str]
    gpus: list[GpuDescription]
    cuda: str | None
    hip: str | None
    nccl: str | None
    cudnn: int | None


def describe(use_gpu: bool) -> NodeDescription:
    """Return the description of this node; GPUs are queried only if they are used."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    description: NodeDescription = {
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        # Fewer than all where a container or a scheduler pins this process.
        "cpus_usable": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "versions": installed_versions(),
        "gpus": [],
    }

    # Only on request: it imports torch and initializes CUDA, which takes seconds.
    if use_gpu:
        _add_gpus(description)

    return description


def installed_versions() -> dict[str, str]:
    """Return {package: version} of those that matter and are installed."""
    versions = {}
    for name in ("dist-ft", *PACKAGES):
        try:
            # The metadata, not `__version__`: importing all of these takes seconds.
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _add_gpus(description: NodeDescription) -> None:
    """Add the GPUs of this node and the versions of their libraries."""
    import torch

    gpus: list[GpuDescription] = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        gpus.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
                "processors": properties.multi_processor_count,
            }
        )

    description["gpus"] = gpus
    description["cuda"] = torch.version.cuda
    description["hip"] = torch.version.hip

    # A build for HIP (RCCL) or without CUDA has no version of NCCL to query.
    description["nccl"] = None
    if torch.version.cuda:
        description["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))

    description["cudnn"] = torch.backends.cudnn.version()
