"""Seeds and pseudo-random values that are pure functions of integers.

Implements splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014) rather than using a library's generator, so that every random draw of a run stays the
same over numpy versions, machines and world sizes.
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1
# 2**64 divided by the golden ratio, and the multipliers of Stafford's variant 13 of MurmurHash3's
# finalizer. Another value would change the data order of every run that is resumed.
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def derive_seed(*values: int) -> int:
    """Return a seed in [0, 2**63) that depends on each of `values` and on their order."""
    # Starting from the length, no seed is an intermediate state of a longer one.
    state = len(values)
    for value in values:
        state = _finalize((state + _GOLDEN + (value & _MASK)) & _MASK)
    # 63 bits, so that a seed also fits in a signed integer.
    return state >> 1


def random_uint64(seed: int, count: int) -> np.ndarray:
    """Return `count` distinct pseudo-random uint64 values, shape (count,), determined by `seed`."""
    index = np.arange(1, count + 1, dtype=np.uint64)
    # uint64 arithmetic wraps, which here is the modulus of the algorithm.
    with np.errstate(over="ignore"):
        spread = _finalize_array(index * np.uint64(_GOLDEN))
        return _finalize_array(spread + np.uint64(seed & _MASK))


def to_unit_interval(values: np.ndarray) -> np.ndarray:
    """Map uint64 values to float64 in [0, 1), same shape, from their 53 high bits."""
    return (values >> np.uint64(11)).astype(np.float64) / 2**53


def _finalize(value: int) -> int:
    """Apply splitmix64's finalizer: a bijection of 64-bit integers that spreads every bit."""
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def _finalize_array(values: np.ndarray) -> np.ndarray:
    """Apply `_finalize` to each element of a uint64 array."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))
