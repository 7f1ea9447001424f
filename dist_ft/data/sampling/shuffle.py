"""The order of items in an epoch: a pure function of seed and epoch.

Knows nothing of shards, packing or lanes. Its arrays have one dimension: the items of the epoch.
"""

from __future__ import annotations

import numpy as np

from dist_ft.core.seeds import derive_seed, random_uint64


def epoch_order(num_items: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Return the order of an epoch, int64 (num_items,): a permutation of range(num_items)."""
    if not shuffle:
        return np.arange(num_items, dtype=np.int64)

    # Sorting random keys instead of calling numpy's shuffle: the order must stay the same over
    # numpy versions, as a run may be resumed with a later one. The keys are distinct.
    sort_keys = random_uint64(derive_seed(seed, epoch), num_items)
    return np.argsort(sort_keys, kind="stable").astype(np.int64)
