"""Packing: which segments share a sequence.

Best-fit decreasing: the longest segment first, each into the open sequence that it fills best. Pure
and deterministic; on usual length distributions a block wastes about one sequence. Does not order
sequences, read tokens or know steps.

P is the number of segments, G the number of sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dist_ft.core.seeds import random_uint64


class SequenceMembers(NamedTuple):
    """The segments of each sequence.

    Attributes:
        members: int64 (P,) segment numbers, sequence after sequence.
        offsets: int64 (G + 1,): sequence g holds members[offsets[g]:offsets[g + 1]].
    """

    members: np.ndarray
    offsets: np.ndarray


def pack_best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the sequence number of each segment, int64 (P,), from 0.

    Open sequences are stored by their free space, and the set of free spaces as one integer with
    one bit each: the best fit for `n` tokens is the lowest set bit from bit `n` up.

    Args:
        lengths: (P,) integers in 1..capacity, in tokens.
        capacity: tokens of a sequence, which no sequence exceeds.

    Raises:
        ValueError: a length is out of range.
    """
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths must lie in 1..{capacity}, not {lengths.min()}..{lengths.max()}")

    open_by_free: list[list[int]] = [[] for _ in range(capacity + 1)]
    free_spaces = 0  # bit f is set if a sequence with f free tokens is open
    num_sequences = 0

    # int64, because negating an unsigned length would wrap around; stable, so that the result does
    # not depend on the sorting algorithm of a numpy version.
    longest_first = np.argsort(-lengths.astype(np.int64), kind="stable")
    sequence_numbers = []

    for length in lengths[longest_first].tolist():
        # Python's integers have any number of bits: a shift and a mask find the best fit without a
        # search over all open sequences.
        fitting = free_spaces >> length
        if fitting:
            lowest_bit = (fitting & -fitting).bit_length() - 1
            free = length + lowest_bit
            sequence = open_by_free[free].pop()
            if not open_by_free[free]:
                free_spaces ^= 1 << free
            left = free - length
        else:
            sequence = num_sequences
            num_sequences += 1
            left = capacity - length

        # a full sequence is never looked up again
        if left:
            if not open_by_free[left]:
                free_spaces |= 1 << left
            open_by_free[left].append(sequence)
        sequence_numbers.append(sequence)

    assignment = np.empty(len(lengths), dtype=np.int64)
    assignment[longest_first] = sequence_numbers
    return assignment


def group_into_sequences(
    lengths: np.ndarray, capacity: int, packed: bool, seed: int | None, sort_pool: int = 0
) -> SequenceMembers:
    """Group the segments of a block into sequences.

    Args:
        lengths: (P,) tokens of the segments.
        capacity: tokens of a sequence.
        packed: put several segments into a sequence; else one each.
        seed: changes which segments of equal length share a sequence, but not the number of
            sequences (best-fit decreasing sees lengths only). None: storage order, with sequences
            in the order of their first segment.
        sort_pool: not packed: sort this many neighboring segments at a time by length; 0: do not.
    """
    count = len(lengths)
    if seed is None:
        order = np.arange(count)
    else:
        order = np.argsort(random_uint64(seed, count), kind="stable")

    if not packed or not count:
        if sort_pool:
            # Pools are cut from the shuffled order, so each epoch sorts other neighbors together.
            pool_number = np.arange(count) // sort_pool  # (P,)
            order = order[np.lexsort((lengths[order], pool_number))]
        return SequenceMembers(order, np.arange(count + 1))

    assigned = pack_best_fit(lengths[order], capacity)  # (P,)
    if seed is None:
        # Best fit opens sequences from the longest segment down. Without shuffling, an epoch must
        # follow the order of the data instead.
        assigned = _number_by_first_member(assigned)

    # the stable sort keeps the members of a sequence in the order of `order`
    members = order[np.argsort(assigned, kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(assigned))])  # (G + 1,)
    return SequenceMembers(members, offsets)


def _number_by_first_member(assigned: np.ndarray) -> np.ndarray:
    """Renumber sequences (P,) in the order of their first segments."""
    first_member = np.unique(assigned, return_index=True)[1]  # (G,)

    # the inverse of the permutation that sorts sequences by their first member
    new_number = np.empty(len(first_member), dtype=np.int64)
    new_number[np.argsort(first_member, kind="stable")] = np.arange(len(first_member))
    return new_number[assigned]
