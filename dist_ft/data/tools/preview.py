"""Preview the training data: samples with their target tokens marked, and statistics.

The marks show what the loss counts, after truncation and shifting, not what a template promises.

n is the number of tokens of a segment, or of sequences of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dist_ft.data.batching.loader import Loader
from dist_ft.data.blocks.segments import split_into_segments
from dist_ft.data.blocks.token_cache import TokenizedBlock
from dist_ft.data.encoding.chat import Encoder
from dist_ft.data.sampling.packing import group_into_sequences

MAX_BLOCKS = 32
"""Lengths and padding are measured on at most this many blocks."""


@dataclass(frozen=True)
class DataStatistics:
    """The statistics of a dataset and of its first epoch.

    Attributes:
        num_samples: rows of all shards.
        num_left_out: rows without any token to train on.
        num_bad: rows of num_samples that cannot be used (data.bad_rows=skip).
        min_tokens, median_tokens, p95_tokens, max_tokens: tokens of a sample before truncation.
        target_share: target tokens / tokens trained on, 0..1.
        fill: tokens / (sequences * sequence length), 0..1.
        padding_share: padding / positions computed, 0..1 (each micro-batch is as wide as its
            longest sequence).
        num_sequences: sequences of epoch 0.
        num_steps: optimizer steps of epoch 0.
        num_blocks: blocks of the dataset.
    """

    num_samples: int
    num_left_out: int
    num_bad: int
    min_tokens: int
    median_tokens: int
    p95_tokens: int
    max_tokens: int
    target_share: float
    fill: float
    padding_share: float
    num_sequences: int
    num_steps: int
    num_blocks: int


class _SegmentRef(NamedTuple):
    """A segment of a sample: consecutive tokens of one row of a block.

    Attributes:
        block: number of the block.
        row: number of the row in the block.
        start: first token in the row.
        num_tokens: tokens of the segment.
    """

    block: int
    row: int
    start: int
    num_tokens: int


def compute_statistics(loader: Loader) -> DataStatistics:
    """Return the statistics of a loader's data and of its first epoch.

    Lengths and padding are those of the first `MAX_BLOCKS` blocks.
    """
    index = loader.index
    batch = loader.plan.batch
    numbers = range(min(MAX_BLOCKS, len(index.blocks)))
    row_lengths = np.concatenate([np.diff(loader.store.block(n).offsets) for n in numbers])
    # "nearest" gives lengths of real samples, not averages of two
    quantiles = np.quantile(row_lengths, [0, 0.5, 0.95, 1], method="nearest")
    low, median, p95, high = quantiles.tolist()

    sequence_lengths = np.concatenate([_sequence_lengths(loader, n) for n in numbers])
    num_positions = _num_positions(sequence_lengths, batch.global_batch, batch.micro_batch)
    # these are known for all blocks
    num_tokens = index.total("num_tokens")
    num_sequences = index.total("num_sequences")
    return DataStatistics(
        num_samples=index.num_samples,
        num_left_out=index.total("num_left_out"),
        num_bad=index.total("num_bad"),
        min_tokens=int(low),
        median_tokens=int(median),
        p95_tokens=int(p95),
        max_tokens=int(high),
        target_share=index.total("num_targets") / num_tokens,
        fill=num_tokens / (num_sequences * batch.sequence_length),
        padding_share=1 - float(sequence_lengths.sum()) / num_positions,
        num_sequences=num_sequences,
        num_steps=loader.plan.num_steps_in_epochs(1),
        num_blocks=len(index.blocks),
    )


def _sequence_lengths(loader: Loader, number: int) -> np.ndarray:
    """Return the tokens of each sequence of a block in epoch 0, int64 (n,)."""
    packed = loader.packed(0, number)
    segment_lengths = packed.segments[packed.sequences.members, 2]  # sequence after sequence

    # differences of prefix sums: the tokens between two edges of sequences
    tokens_before = np.concatenate([[0], np.cumsum(segment_lengths)])
    return np.diff(tokens_before[packed.sequences.offsets])


def _num_positions(lengths: np.ndarray, global_batch: int, micro_batch: int) -> int:
    """Return the positions computed for sequences of `lengths` tokens.

    Each lane computes its number of sequences times its longest sequence.
    """
    number = np.arange(len(lengths))
    lanes_per_step = -(-global_batch // micro_batch)

    # an own number for each lane of each step, ascending over the sequences
    lane_in_step = number % global_batch // micro_batch
    lanes = number // global_batch * lanes_per_step + lane_in_step

    lane_starts = np.flatnonzero(np.diff(lanes, prepend=-1))
    widths = np.maximum.reduceat(lengths, lane_starts)
    num_sequences = np.diff(lane_starts, append=len(lengths))
    return int((widths * num_sequences).sum())


def format_statistics(statistics: DataStatistics, packed: bool) -> str:
    """Return statistics as lines for people."""
    samples = f"{statistics.num_samples}"
    if statistics.num_left_out:
        samples += f", of which {statistics.num_left_out} are not trained on"
    if statistics.num_bad:
        samples += f" ({statistics.num_bad} bad rows)"

    if packed:
        use = f"packed, {statistics.fill:.1%} full"
    else:
        use = f"not packed, {statistics.padding_share:.1%} of the positions are padding"

    return "\n".join(
        [
            f"samples        {samples}",
            f"tokens         min {statistics.min_tokens}, median {statistics.median_tokens}, 95th "
            f"percentile {statistics.p95_tokens}, max {statistics.max_tokens} per sample",
            f"target tokens  {statistics.target_share:.1%} of the tokens",
            f"sequences      {statistics.num_sequences} ({use})",
            f"steps          {statistics.num_steps} per epoch",
        ]
    )


def pack_stats(loader: Loader) -> str:
    """Return a table of how full sequences are, at half, once and twice the sequence length."""
    sequence_length = loader.plan.batch.sequence_length

    # the table counts what is too long at each length, so no length is an error here
    overlong = loader.plan.data.overlong
    if overlong == "error":
        overlong = "truncate"

    lines = [
        f"{'length':>8}{'too long':>10}{'sequences':>11}{'packed full':>13}{'unpacked full':>15}"
    ]
    for length in (sequence_length // 2, sequence_length, sequence_length * 2):
        num_sequences = num_tokens = num_segments = num_too_long = 0
        for number in range(min(MAX_BLOCKS, len(loader.index.blocks))):
            block = loader.store.block(number)
            sizes = split_into_segments(block, length, overlong).bounds[:, 2]
            # packed whatever data.pack says, as the table compares both
            sequences = group_into_sequences(sizes, length, True, None)
            num_sequences += len(sequences.offsets) - 1
            num_tokens += int(sizes.sum())
            num_segments += len(sizes)
            num_too_long += int((np.diff(block.offsets) > length).sum())

        packed_fill = num_tokens / max(1, num_sequences * length)
        unpacked_fill = num_tokens / max(1, num_segments * length)
        lines.append(
            f"{length:>8}{num_too_long:>10}{num_sequences:>11}{packed_fill:>13.1%}{unpacked_fill:>15.1%}"
        )

    return "\n".join(lines)


def preview(loader: Loader, num_samples: int = 3, markup: bool = False) -> str:
    """Return the first samples as text with the target tokens in [[ ]], then the statistics.

    Args:
        loader: the data.
        num_samples: number of samples to show, in storage order.
        markup: mark the targets in rich's markup instead of [[ ]], and escape other brackets.
    """
    sections = []
    for segment in _first_segments(loader, num_samples):
        sample = int(loader.index.first_samples[segment.block]) + segment.row
        location = loader.index.locate_sample(sample)
        shown = ShownSegment(
            f"sample {sample} ({location.shard.url} row {location.row + 1})",
            loader.store.block(segment.block),
            (segment.row, segment.start, segment.num_tokens),
        )
        sections.append(format_segment(shown, loader.store.encoder, markup))
    statistics = format_statistics(compute_statistics(loader), loader.plan.data.pack)
    return "\n\n".join([*sections, statistics])


class ShownSegment(NamedTuple):
    """A segment to show.

    Attributes:
        name: sample and location.
        block: the tokens of its block or slice.
        bounds: row in the block, first token, number of tokens.
    """

    name: str
    block: TokenizedBlock
    bounds: tuple[int, int, int]


def format_segment(segment: ShownSegment, encoder: Encoder, markup: bool) -> str:
    """Return a segment's location and number of tokens, and its text with the targets marked."""
    block = segment.block
    row, first, num_tokens = segment.bounds
    start = int(block.offsets[row]) + first
    stop = start + num_tokens
    is_target = block.is_target[start:stop]  # (n,), computed anew, not a view of the file
    # The first token cannot be a next-token target; a task's label may be on it.
    is_target[0] &= block.is_labeled

    head = f"{segment.name}: {num_tokens} tokens, {int(is_target.sum())} of them targets"
    labels = encoder.describe_targets(block.targets[start:stop])
    if labels:
        head += f" (label: {labels})"
    if markup:
        head = _escape(head)

    text = mark_targets(encoder.tokenizer, block.tokens[start:stop], is_target, markup)
    return f"{head}\n{text}"


def _first_segments(loader: Loader, count: int) -> list[_SegmentRef]:
    """Return the first `count` segments in storage order."""
    sequence_length = loader.plan.batch.sequence_length
    overlong = loader.plan.data.overlong
    found: list[_SegmentRef] = []
    for number in range(len(loader.index.blocks)):
        # before reading the next block, which may have to be tokenized
        if len(found) >= count:
            break

        segments = split_into_segments(loader.store.block(number), sequence_length, overlong)
        for row, start, num_tokens in segments.bounds[: count - len(found)].tolist():
            found.append(_SegmentRef(number, row, start, num_tokens))

    return found


def mark_targets(
    tokenizer: Any, tokens: np.ndarray, is_target: np.ndarray, markup: bool = False
) -> str:
    """Return tokens (n,) as text, with runs of targets (n,) bool marked."""
    # a run ends where the next token is of the other kind
    changes = np.flatnonzero(np.diff(is_target)) + 1
    run_stops = [*changes.tolist(), len(tokens)]

    previous_text = ""
    marked = []
    for stop in run_stops:
        # Decode from the start each time: a run alone would lose the blank before its first word.
        text = tokenizer.decode(
            tokens[:stop].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        run = text[len(previous_text) :]
        marked.append(_mark_run(run, bool(is_target[stop - 1]), markup))
        previous_text = text

    return "".join(marked)


def _mark_run(text: str, is_target: bool, markup: bool) -> str:
    """Return the text of a run, marked if it is a target."""
    if markup:
        text = _escape(text)
    if not is_target:
        return text

    if markup:
        return f"[bold green]{text}[/bold green]"
    return f"[[{text}]]"


def _escape(text: str) -> str:
    """Escape rich's markup."""
    from rich.markup import escape

    return escape(text)
