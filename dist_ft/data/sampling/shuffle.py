"""The order of samples in an epoch: a pure function of seed and epoch.

Built on splitmix64 written out here, never on a library's generator, so an order (and with it every step of a run)
stays the same over numpy versions, machines and world sizes. Does not know shards, packing or lanes.
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def mix(*values: int) -> int:
    """Return a seed in [0, 2**63) that depends on every one of `values` and on their order."""
    state = len(values)
    for value in values:
        state = _finish((state + _GOLDEN + (value & _MASK)) & _MASK)
    return state >> 1


def hashes(seed: int, count: int) -> np.ndarray:
    """Return `count` different pseudo-random uint64 values, shape (count,), that follow from `seed`."""
    index = np.arange(1, count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        spread = _finish_array(index * np.uint64(_GOLDEN))
        return _finish_array(spread + np.uint64(seed & _MASK))


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Return the sample ids of an epoch in order, int64 (num_samples,): each of range(num_samples) exactly once."""
    if not shuffle:
        return np.arange(num_samples, dtype=np.int64)
    return np.argsort(hashes(mix(seed, epoch), num_samples), kind="stable").astype(np.int64)


def _finish(value: int) -> int:
    """Splitmix64's finaliser: a bijection of 64-bit integers that spreads every bit."""
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def _finish_array(values: np.ndarray) -> np.ndarray:
    """As `_finish`, on a uint64 array."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))
