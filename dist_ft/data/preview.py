"""What training will see, as text: samples with what is learned marked, and the numbers of an epoch.

Pure over index, cache and plan; the command line prints it. What is marked is what the loss counts, after cutting and
shifting, not what a template promises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_ft.data.cache import TokenCache
from dist_ft.data.index import Index
from dist_ft.data.plan import Plan


@dataclass(frozen=True)
class Statistics:
    """The numbers of a data set and of its first epoch.

    Attributes:
        num_samples: rows of all shards.
        num_left_out: rows of which nothing is trained on.
        min_tokens, median_tokens, p95_tokens, max_tokens: lengths of samples, uncut, in tokens.
        learned_share: targets / tokens of what is trained on, 0..1.
        fill: tokens / (sequences * sequence length), 0..1.
        padding_share: padding / positions computed, 0..1 (each micro-batch is as wide as its longest sequence).
        num_sequences: sequences of epoch 0.
        num_steps: optimizer steps of epoch 0.
    """

    num_samples: int
    num_left_out: int
    min_tokens: int
    median_tokens: int
    p95_tokens: int
    max_tokens: int
    learned_share: float
    fill: float
    padding_share: float
    num_sequences: int
    num_steps: int


def statistics(index: Index, plan: Plan) -> Statistics:
    """Return the numbers of an index and of the first epoch of its plan."""
    epoch = plan.epoch(0)
    sizes = np.add.reduceat(index.pieces[epoch.members, 2], epoch.offsets[:-1])
    tokens = int(sizes.sum())
    low, median, p95, high = np.quantile(index.lengths, [0, 0.5, 0.95, 1], method="nearest").tolist()
    return Statistics(
        num_samples=index.num_samples, num_left_out=index.num_left_out, min_tokens=int(low),
        median_tokens=int(median), p95_tokens=int(p95), max_tokens=int(high),
        learned_share=float(index.piece_targets.sum()) / tokens,
        fill=tokens / (len(sizes) * plan.batch.sequence_length),
        padding_share=1 - tokens / _positions(sizes, plan.batch.global_batch, plan.batch.micro_batch),
        num_sequences=len(sizes), num_steps=plan.steps_in_epoch(0))


def _positions(sizes: np.ndarray, global_batch: int, micro_batch: int) -> int:
    """Return the positions computed for sequences of `sizes` tokens: rows times the widest, over all lanes."""
    number = np.arange(len(sizes))
    lanes = number // global_batch * -(-global_batch // micro_batch) + number % global_batch // micro_batch
    starts = np.flatnonzero(np.diff(lanes, prepend=-1))
    return int((np.maximum.reduceat(sizes, starts) * np.diff(starts, append=len(sizes))).sum())


def describe(numbers: Statistics, packed: bool) -> str:
    """Return the lines that tell a person about `numbers`."""
    left_out = f", {numbers.num_left_out} left out" if numbers.num_left_out else ""
    use = (f"packed, {numbers.fill:.1%} full" if packed
           else f"not packed, {numbers.padding_share:.1%} of the positions are padding")
    return "\n".join([
        f"samples    {numbers.num_samples}{left_out}",
        f"tokens     min {numbers.min_tokens}, median {numbers.median_tokens}, 95% {numbers.p95_tokens}, "
        f"max {numbers.max_tokens}",
        f"learned    {numbers.learned_share:.1%} of the tokens",
        f"sequences  {numbers.num_sequences} ({use})",
        f"steps      {numbers.num_steps} an epoch"])


def preview(index: Index, cache: TokenCache, plan: Plan, num_samples: int = 3, rich: bool = False) -> str:
    """Return the first samples as text, learned parts in [[ ]] (or in rich's markup), then the numbers.

    Args:
        index: the samples.
        cache: gives their tokens and the tokenizer.
        plan: gives sequences and steps.
        num_samples: how many samples are shown, in the order they lie.
        rich: mark with rich's markup, other brackets escaped, in place of [[ ]].
    """
    blocks = []
    for sample, first, size in index.pieces[:num_samples].tolist():
        shard, row = index.place(sample)
        tokenised = cache.shard(shard)
        start = int(tokenised.offsets[row]) + first
        learned = tokenised.targets[start:start + size].astype(bool)
        learned[0] = False
        head = f"sample {sample} ({shard.url} row {row + 1}): {size} tokens, {int(learned.sum())} learned"
        text = mark(cache.encoder.tokenizer, tokenised.tokens[start:start + size], learned, rich)
        blocks.append(f"{_escape(head) if rich else head}\n{text}")
    return "\n\n".join([*blocks, describe(statistics(index, plan), plan.data.pack)])


def mark(tokenizer: Any, tokens: np.ndarray, learned: np.ndarray, rich: bool = False) -> str:
    """Return tokens (n,) as text, runs of learned (n,) bool ones marked."""
    wrap: Callable[[str], str] = (lambda text: f"[bold green]{_escape(text)}[/bold green]") if rich else "[[{}]]".format
    plain: Callable[[str], str] = _escape if rich else str
    ends = [*(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(tokens)]
    shown, marked = "", []
    for end in ends:  # decoded from the start each time: a run alone would lose the blank before its first word
        whole = tokenizer.decode(tokens[:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        marked.append((wrap if learned[end - 1] else plain)(whole[len(shown):]))
        shown = whole
    return "".join(marked)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
