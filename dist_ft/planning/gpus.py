"""Which GPUs there are, how fast they are, what fits on them, and how many it takes. Pure.

Sizes are what the makers' data sheets say, in 10^9 bytes; the driver shows somewhat less or more of it.
"""

from __future__ import annotations

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
"""GB by name."""
PEAK_TFLOPS = {
    "GB200": 2500,
    "B200": 2250,
    "B100": 1750,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "A40": 150,
    "A10G": 70,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "V100": 125,
    "T4": 65,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "MI300X": 1307,
    "MI250X": 383,
}
"""16-bit matrix products without sparsity, TFLOP/s, by a part of the name that a device gives itself."""
HEADROOM = 0.1
"""Share of a GPU left to what is not counted: CUDA context, NCCL, workspaces, the allocator's fragmentation."""
A_NODE = 8


def named(name: str) -> str:
    """Return the table's name of a GPU: case, spaces, and a maker's name do not count.

    Raises ConfigError for one that is not in the table, or an A100 without its size.
    """

    def plain(text: str) -> str:
        return "".join(
            c for c in text.lower().removeprefix("nvidia").removeprefix("amd") if c.isalnum()
        )

    wanted = plain(name.strip())
    found = [
        known
        for known in GPUS
        if wanted
        in (
            plain(known),
            plain(known).removesuffix("gb"),
            plain(known) + f"{GPUS[known]}gb",
            plain(known) + f"{GPUS[known]}",
        )
    ]
    if not found:
        raise ConfigError(
            [f"--gpu={name}: no such GPU is known; known are {', '.join(GPUS)}; give one of those"],
            "plan",
        )
    return found[0]


def room(name: str) -> int:
    """Return the bytes of a GPU that a worker may plan with."""
    return int(GPUS[name] * 10**9 * (1 - HEADROOM))


def fewest(need: Callable[[int], int], most: int, room_bytes: int) -> int | None:
    """Return the fewest workers, at most `most`, whose `need(workers)` fits into the room; None: none does.

    More workers do not need more (ZeRO-2 may, by a weight that lies across a border).
    """
    if need(most) > room_bytes:
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if need(middle) <= room_bytes else (middle + 1, high)
    return low


def peak_tflops(name: str) -> float | None:
    """Return the 16-bit peak of a device in TFLOP/s by its name; None: not known here."""
    return next(
        (float(peak) for part, peak in PEAK_TFLOPS.items() if part.lower() in name.lower()), None
    )
