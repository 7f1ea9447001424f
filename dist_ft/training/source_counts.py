"""How much each source of a mixture of training data has contributed.

Dimensions: S sources, R rows that hold a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_ft.config.schema import RunConfig
from dist_ft.data.batch import Batch


class SourceCounts:
    """Counts sequences and tokens of each source; with one source there is nothing to count."""

    def __init__(self, config: RunConfig) -> None:
        """Start at zero."""
        self._names = source_names(config)
        self._counts = np.zeros((len(self._names), 2))  # (S, 2): [sequences, tokens]

    def count(self, batches: Sequence[Batch]) -> list[float]:
        """Return [sequences, tokens] of each source in this worker's `batches`, flat."""
        if not self._names:
            return []

        counts = np.zeros_like(self._counts)  # (S, 2)
        for batch in batches:
            sources, num_tokens = batch.row_sources[:, 0], batch.row_sources[:, 1]  # (R,) each
            num_sequences = np.ones(len(sources))

            # `counts[sources] += ...` would count a source once, however often it occurs.
            np.add.at(counts, sources, np.column_stack([num_sequences, num_tokens]))

        # Flat, as it is part of the sum over workers that each step makes anyway.
        return counts.reshape(-1).tolist()

    def add(self, counts: Sequence[float]) -> None:
        """Add what `count` returned, summed over all workers."""
        self._counts += np.reshape(counts, self._counts.shape)

    def take_metrics(self, epochs: Sequence[float]) -> dict[str, float]:
        """Return the metrics since the last call; `epochs`: those that each source has done."""
        if not self._names:
            return {}

        metrics = {}
        for name, (num_sequences, num_tokens), epoch in zip(
            self._names, self._counts, epochs, strict=True
        ):
            metrics[f"sequences/{name}"] = float(num_sequences)
            metrics[f"tokens/{name}"] = float(num_tokens)
            metrics[f"epoch/{name}"] = float(epoch)

        self._counts = np.zeros_like(self._counts)
        return metrics


def source_names(config: RunConfig) -> list[str]:
    """Return the names of the training data's sources in metrics; empty if there is only one."""
    sources = config.data.train
    if len(sources) == 1:
        return []

    return [source.name or f"source-{i}" for i, source in enumerate(sources)]
