"""Packing: which samples of a window share a sequence.

Best-fit decreasing: longest first, each into the sequence it fills best. Pure and deterministic; the waste on usual
length distributions is about one sequence a window. Does not order sequences, read tokens or know of steps.
"""

from __future__ import annotations

import numpy as np

from dist_ft.data.sampling.shuffle import hashes


def pack(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the sequence number of each item, int64 (N,): numbers are 0.., and no sequence exceeds `capacity`.

    Args:
        lengths: (N,) integers in 1..capacity, in tokens.
        capacity: tokens a sequence.

    Open sequences are kept by free space, and the set of free spaces as one integer with a bit each: the best fit
    for `n` tokens is the lowest set bit from bit `n` up.
    """
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths must lie in 1..{capacity}, not {lengths.min()}..{lengths.max()}")
    by_free: list[list[int]] = [[] for _ in range(capacity + 1)]
    free_spaces = 0
    num_sequences = 0
    longest_first = np.argsort(-lengths.astype(np.int64), kind="stable")
    placed = []
    for length in lengths[longest_first].tolist():
        fitting = free_spaces >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            sequence = by_free[free].pop()
            if not by_free[free]:
                free_spaces ^= 1 << free
            left = free - length
        else:
            sequence, left = num_sequences, capacity - length
            num_sequences += 1
        if left:
            if not by_free[left]:
                free_spaces |= 1 << left
            by_free[left].append(sequence)
        placed.append(sequence)
    assignment = np.empty(len(lengths), dtype=np.int64)
    assignment[longest_first] = placed
    return assignment


def sequences_of(
    lengths: np.ndarray, capacity: int, packed: bool, seed: int | None, pool: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sequences of a block of pieces: (members, offsets), sequence g being members[offsets[g]:offsets[g+1]].

    Args:
        lengths: (P,) tokens of the pieces.
        capacity: tokens a sequence.
        packed: several pieces to a sequence; else one.
        seed: which of the pieces of equal length share sequences changes with it, the number of sequences does not
            (best-fit decreasing sees lengths only); None: as they lie, sequences in the order of their first piece.
        pool: not packed: so many neighbours at a time are put in the order of their lengths; 0: none.
    """
    count = len(lengths)
    order = np.arange(count) if seed is None else np.argsort(hashes(seed, count), kind="stable")
    if not packed or not count:
        if pool:
            order = order[np.lexsort((lengths[order], np.arange(count) // pool))]
        return order, np.arange(count + 1)
    assigned = pack(lengths[order], capacity)
    if seed is None:
        first = np.unique(assigned, return_index=True)[1]
        rank = np.empty(len(first), dtype=np.int64)
        rank[np.argsort(first, kind="stable")] = np.arange(len(first))
        assigned = rank[assigned]
    members = order[np.argsort(assigned, kind="stable")]
    return members, np.concatenate([[0], np.cumsum(np.bincount(assigned))])
