"""Preview a stream: its first samples, and statistics of some slices, without reading all of it."""

from __future__ import annotations

import numpy as np

from dist_ft.data.batching.loader import Loader
from dist_ft.data.batching.stream_loader import StreamLoader
from dist_ft.data.blocks.segments import split_into_segments
from dist_ft.data.blocks.slices import first_sample
from dist_ft.data.sampling.packing import group_into_sequences
from dist_ft.data.tools.preview import ShownSegment, format_segment, preview

MEASURED_SLICES = 16
"""Slices that statistics are computed of, spread evenly over the stream."""


def preview_any(loader: Loader | StreamLoader, num_samples: int = 3, markup: bool = False) -> str:
    """Return `preview` of an indexed data set, or `preview_stream` of a stream."""
    if isinstance(loader, StreamLoader):
        return preview_stream(loader, num_samples, markup)
    return preview(loader, num_samples, markup)


def preview_stream(loader: StreamLoader, num_samples: int = 3, markup: bool = False) -> str:
    """Return the first samples as text with the target tokens in [[ ]], then statistics.

    Args:
        loader: the data.
        num_samples: number of samples to show, in storage order.
        markup: mark the targets in rich's markup instead of [[ ]], and escape other brackets.
    """
    sections = []
    for segment in _first_segments(loader, num_samples):
        sections.append(format_segment(segment, loader.store.encoder, markup))
    return "\n\n".join([*sections, _format_statistics(loader)])


def _first_segments(loader: StreamLoader, count: int) -> list[ShownSegment]:
    """Return the first `count` segments in storage order."""
    store = loader.store
    found: list[ShownSegment] = []
    for number in range(store.slices.count):
        # before reading the next slice, which may have to be tokenized
        if len(found) >= count:
            break

        block = store.read(number)
        ranges = store.slices.block(number).ranges
        urls = list(dict.fromkeys(store.slices.shards[part.shard].url for part in ranges))
        segments = split_into_segments(
            block, loader.plan.batch.sequence_length, loader.plan.data.overlong
        )
        for row, first, num_tokens in segments.bounds[: count - len(found)].tolist():
            name = f"sample {first_sample(number) + row} ({', '.join(urls)}, row {row + 1} of slice"
            found.append(ShownSegment(f"{name} {number})", block, (row, first, num_tokens)))
    return found


def _format_statistics(loader: StreamLoader) -> str:
    """Return statistics of some slices as lines for people."""
    store, data, batch = loader.store, loader.plan.data, loader.plan.batch
    count = store.slices.count
    numbers = np.unique(np.linspace(0, count - 1, min(count, MEASURED_SLICES)).astype(int))

    row_lengths = [np.zeros(0, dtype=np.int64)]
    segment_lengths = [np.zeros(0, dtype=np.int64)]
    num_targets = num_bad = 0
    for number in numbers.tolist():
        block = store.read(number)
        segments = split_into_segments(block, batch.sequence_length, data.overlong)
        row_lengths.append(np.diff(block.offsets))
        segment_lengths.append(segments.bounds[:, 2])
        num_targets += int(segments.num_targets.sum())
        num_bad += len(block.bad_rows)

    rows = np.concatenate(row_lengths)
    lengths = np.concatenate(segment_lengths)
    packed = group_into_sequences(lengths, batch.sequence_length, data.pack, None)
    num_sequences = len(packed.offsets) - 1
    scale = count / len(numbers)
    low, median, p95, high = [0, 0, 0, 0]
    if len(rows):
        low, median, p95, high = np.quantile(rows, [0, 0.5, 0.95, 1], method="nearest").tolist()

    samples = f"about {round(len(rows) * scale):,}"
    if num_bad:
        samples += f" ({num_bad} bad rows among those measured)"
    num_steps = round(num_sequences * scale / batch.global_batch)
    fill = lengths.sum() / max(1, num_sequences * batch.sequence_length)
    return "\n".join(
        [
            f"streamed; measured on {len(numbers)} of {count:,} slices",
            f"samples        {samples}",
            f"tokens         min {low}, median {median}, 95th percentile {p95}, max {high} per "
            "sample",
            f"target tokens  {num_targets / max(1, lengths.sum()):.1%} of the tokens",
            f"sequences      about {round(num_sequences * scale):,} ({fill:.1%} full)",
            f"steps          about {num_steps:,} per epoch",
        ]
    )
