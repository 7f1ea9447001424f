"""What training will see, as text: samples with what is learned marked, and the numbers of an epoch.

What is marked is what the loss counts, after cutting and shifting, not what a template promises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_ft.data.batching.loader import Loader
from dist_ft.data.blocks.segments import split_into_segments
from dist_ft.data.sampling.packing import group_into_sequences

MAX_BLOCKS = 32
"""Lengths and padding are told from so many blocks at most."""


@dataclass(frozen=True)
class DataStatistics:
    """The numbers of a data set and of its first epoch.

    Attributes:
        num_samples: rows of all shards.
        num_left_out: rows of which nothing is trained on.
        num_bad: of these, rows that can not be used (data.bad_rows=skip).
        min_tokens, median_tokens, p95_tokens, max_tokens: lengths of samples, uncut, in tokens.
        learned_share: targets / tokens of what is trained on, 0..1.
        fill: tokens / (sequences * sequence length), 0..1.
        padding_share: padding / positions computed, 0..1 (each micro-batch is as wide as its longest sequence).
        num_sequences: sequences of epoch 0.
        num_steps: optimizer steps of epoch 0.
        num_blocks: blocks the data set falls into.
    """

    num_samples: int
    num_left_out: int
    num_bad: int
    min_tokens: int
    median_tokens: int
    p95_tokens: int
    max_tokens: int
    learned_share: float
    fill: float
    padding_share: float
    num_sequences: int
    num_steps: int
    num_blocks: int


def compute_statistics(loader: Loader) -> DataStatistics:
    """Return the numbers of a loader's data and of its first epoch; lengths are those of the first blocks."""
    index, batch = loader.index, loader.plan.batch
    blocks = [loader.store.block(number) for number in range(min(MAX_BLOCKS, len(index.blocks)))]
    lengths = np.concatenate([np.diff(block.offsets) for block in blocks])
    sizes = np.concatenate([_sequence_tokens(loader, number) for number in range(len(blocks))])
    low, median, p95, high = np.quantile(lengths, [0, 0.5, 0.95, 1], method="nearest").tolist()
    tokens, sequences = index.total("num_tokens"), index.total("num_sequences")
    return DataStatistics(
        num_samples=index.num_samples,
        num_left_out=index.total("num_left_out"),
        num_bad=index.total("num_bad"),
        min_tokens=int(low),
        median_tokens=int(median),
        p95_tokens=int(p95),
        max_tokens=int(high),
        learned_share=index.total("num_targets") / tokens,
        fill=tokens / (sequences * batch.sequence_length),
        padding_share=1
        - float(sizes.sum()) / _num_positions(sizes, batch.global_batch, batch.micro_batch),
        num_sequences=sequences,
        num_steps=loader.plan.num_steps_in_epochs(1),
        num_blocks=len(index.blocks),
    )


def _sequence_tokens(loader: Loader, number: int) -> np.ndarray:
    """Return the tokens of each sequence of a block in epoch 0, int64 (n,)."""
    found = loader.packed(0, number)
    filled = np.concatenate([[0], np.cumsum(found.segments[found.sequences.members, 2])])
    return np.diff(filled[found.sequences.offsets])


def _num_positions(sizes: np.ndarray, global_batch: int, micro_batch: int) -> int:
    """Return the positions computed for sequences of `sizes` tokens: rows times the widest, over all lanes."""
    number = np.arange(len(sizes))
    lanes = (
        number // global_batch * -(-global_batch // micro_batch)
        + number % global_batch // micro_batch
    )
    starts = np.flatnonzero(np.diff(lanes, prepend=-1))
    return int((np.maximum.reduceat(sizes, starts) * np.diff(starts, append=len(sizes))).sum())


def format_statistics(numbers: DataStatistics, packed: bool) -> str:
    """Return the lines that tell a person about `numbers`."""
    left_out = f", {numbers.num_left_out} left out" if numbers.num_left_out else ""
    bad = f" ({numbers.num_bad} can not be used)" if numbers.num_bad else ""
    use = (
        f"packed, {numbers.fill:.1%} full"
        if packed
        else f"not packed, {numbers.padding_share:.1%} of the positions are padding"
    )
    return "\n".join(
        [
            f"samples    {numbers.num_samples}{left_out}{bad}",
            f"tokens     min {numbers.min_tokens}, median {numbers.median_tokens}, 95% {numbers.p95_tokens}, "
            f"max {numbers.max_tokens}",
            f"learned    {numbers.learned_share:.1%} of the tokens",
            f"sequences  {numbers.num_sequences} ({use})",
            f"steps      {numbers.num_steps} an epoch",
        ]
    )


def pack_stats(loader: Loader) -> str:
    """Return a table: sequences, fill and padding for the run's sequence length, its half and its double."""
    data, own = loader.plan.data, loader.plan.batch.sequence_length
    overlong = "truncate" if data.overlong == "error" else data.overlong
    lines = [f"{'length':>8}{'cut':>8}{'sequences':>11}{'packed full':>13}{'unpacked full':>15}"]
    for length in (own // 2, own, own * 2):
        sequences = tokens = segments = cut = 0
        for number in range(min(MAX_BLOCKS, len(loader.index.blocks))):
            block = loader.store.block(number)
            sizes = split_into_segments(block, length, overlong)[0][:, 2]
            sequences += len(group_into_sequences(sizes, length, True, None)[1]) - 1
            tokens, segments = tokens + int(sizes.sum()), segments + len(sizes)
            cut += int((np.diff(block.offsets) > length).sum())
        lines.append(
            f"{length:>8}{cut:>8}{sequences:>11}{tokens / max(1, sequences * length):>13.1%}"
            f"{tokens / max(1, segments * length):>15.1%}"
        )
    return "\n".join(lines)


def preview(loader: Loader, num_samples: int = 3, rich: bool = False) -> str:
    """Return the first samples as text, learned parts in [[ ]] (or in rich's markup), then the numbers.

    Args:
        loader: the data.
        num_samples: how many samples are shown, in the order they lie.
        rich: mark with rich's markup, other brackets escaped, in place of [[ ]].
    """
    blocks = []
    for number, row, first, size in _first_pieces(loader, num_samples):
        tokenised = loader.store.block(number)
        start = int(tokenised.offsets[row]) + first
        learned = tokenised.is_target[start : start + size].copy()
        learned[0] &= tokenised.is_labeled
        sample = int(loader.index.first_samples[number]) + row
        shard, place = loader.index.locate_sample(sample)
        told = loader.store.encoder.describe_targets(tokenised.targets[start : start + size])
        head = f"sample {sample} ({shard.url} row {place + 1}): {size} tokens, {int(learned.sum())} learned"
        head += f" ({told})" if told else ""
        text = mark_targets(
            loader.store.encoder.tokenizer, tokenised.tokens[start : start + size], learned, rich
        )
        blocks.append(f"{_escape(head) if rich else head}\n{text}")
    return "\n\n".join([*blocks, format_statistics(compute_statistics(loader), loader.plan.data.pack)])


def _first_pieces(loader: Loader, count: int) -> list[tuple[int, int, int, int]]:
    """Return (block, row, first token, number of tokens) of the first pieces."""
    found: list[tuple[int, int, int, int]] = []
    for number in range(len(loader.index.blocks)):
        if len(found) >= count:
            break
        block = loader.store.block(number)
        segments, _ = split_into_segments(block, loader.plan.batch.sequence_length, loader.plan.data.overlong)
        found += [(number, *piece) for piece in segments[: count - len(found)].tolist()]
    return found


def mark_targets(tokenizer: Any, tokens: np.ndarray, learned: np.ndarray, rich: bool = False) -> str:
    """Return tokens (n,) as text, runs of learned (n,) bool ones marked."""
    wrap: Callable[[str], str] = (
        (lambda text: f"[bold green]{_escape(text)}[/bold green]") if rich else "[[{}]]".format
    )
    plain: Callable[[str], str] = _escape if rich else str
    ends = [*(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(tokens)]
    shown, marked = "", []
    for end in (
        ends
    ):  # decoded from the start each time: a run alone would lose the blank before its first word
        whole = tokenizer.decode(
            tokens[:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        marked.append((wrap if learned[end - 1] else plain)(whole[len(shown) :]))
        shown = whole
    return "".join(marked)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
