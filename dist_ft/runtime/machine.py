"""What a node is: devices, cores, memory, versions. For reports: no name of the node, no path, no user."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

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


def describe(use_gpu: bool) -> dict[str, Any]:
    """Return what this node is, as JSON takes it; GPUs are asked for only if they are used."""
    return {
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "versions": versions(),
        **(_gpus() if use_gpu else {"gpus": []}),
    }


def versions() -> dict[str, str]:
    """Return the version of every package that matters and is here, by name."""
    found = {}
    for name in ("dist-ft", *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _gpus() -> dict[str, Any]:
    import torch

    gpus = []
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        gpus.append(
            {
                "name": about.name,
                "memory_gib": round(about.total_memory / 2**30, 1),
                "capability": f"{about.major}.{about.minor}",
                "processors": about.multi_processor_count,
            }
        )
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None
    return {
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "nccl": nccl,
        "cudnn": torch.backends.cudnn.version(),
    }
