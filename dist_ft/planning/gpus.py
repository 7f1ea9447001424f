"""Known GPUs: their memory and speed, what fits on them, and how many a run needs. Pure.

Sizes are those of the makers' data sheets, in 10^9 bytes; drivers report slightly other values.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from dist_ft.core.errors import ConfigError

GPUS = {
    "RTX4090": 24,
    "A10G": 24,
    "L4": 24,
    "RTX5090": 32,
    "A100-40GB": 40,
    "L40S": 48,
    "A100-80GB": 80,
    "H100": 80,
    "H100-NVL": 94,
    "H200": 141,
    "B200": 180,
    "MI300X": 192,
}
"""Memory in GB by name."""
PEAK_TFLOPS = {
    "GB200": 2500,
    "B200": 2250,
    "B100": 1750,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A100X": 312,
    "A800": 312,
    "A40": 150,
    "A10G": 70,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "V100": 125,
    "V100S": 130,
    "T4": 65,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "MI300X": 1307,
    "MI250X": 383,
}
"""Dense 16-bit matrix products in TFLOP/s, by words of the name that a device reports."""
HEADROOM = 0.1
"""Share of memory for what is not counted: CUDA context, NCCL, workspaces, fragmentation."""
GPUS_PER_NODE = 8


def canonical_name(name: str) -> str:
    """Return the name of a GPU in `GPUS`; case, spaces and the maker's name are ignored.

    Raises:
        ConfigError: the GPU is unknown, or an A100 without its size.
    """
    # People add the size where the name has none, and leave out its unit: "H200 141GB", "A100 80".
    given = _normalize(name.strip())
    for known, gigabytes in GPUS.items():
        plain = _normalize(known)
        spellings = (
            plain,
            plain.removesuffix("gb"),
            f"{plain}{gigabytes}gb",
            f"{plain}{gigabytes}",
        )
        if given in spellings:
            return known

    # An A100 without its size is unknown on purpose: there are two, and a plan must not guess.
    raise ConfigError(
        [f"--gpu={name}: unknown GPU. Known GPUs: {', '.join(GPUS)}. Use one of these."], "plan"
    )


def _normalize(name: str) -> str:
    without_maker = name.lower().removeprefix("nvidia").removeprefix("amd")
    # "NVIDIA H100-NVL" and "h100nvl" are the same
    return "".join(character for character in without_maker if character.isalnum())


def usable_bytes(name: str) -> int:
    """Return the bytes of a GPU that a worker may plan with."""
    return int(GPUS[name] * 10**9 * (1 - HEADROOM))


def fewest_workers(
    bytes_per_worker: Callable[[int], int], max_workers: int, available_bytes: int
) -> int | None:
    """Return the fewest workers for which `bytes_per_worker(workers)` fits; None: none does.

    More workers do not need more each (ZeRO-2 may, by a weight that lies across a border).
    """
    if bytes_per_worker(max_workers) > available_bytes:
        return None

    # bisection: what fits on N workers fits on more
    low, high = 1, max_workers
    while low < high:
        middle = (low + high) // 2
        if bytes_per_worker(middle) <= available_bytes:
            high = middle
        else:
            low = middle + 1

    return low


def peak_tflops(name: str) -> float | None:
    """Return the 16-bit peak of a device in TFLOP/s by its name; None: unknown."""
    # The first match counts: in the table, longer names come before those they contain (H100 PCIe,
    # H100). Only whole words: an RTX A4000 is no A40, and another letter is another speed (A10G).
    for part, peak in PEAK_TFLOPS.items():
        whole_words = rf"(?<![a-z0-9]){part}(?![a-z0-9])"
        if re.search(whole_words, name, re.IGNORECASE):
            return float(peak)
    return None
