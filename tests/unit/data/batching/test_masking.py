"""Masks follow from seed, epoch and sample, in the shares of the paper."""

from __future__ import annotations

import numpy as np

from dist_ft.data.batch import IGNORED
from dist_ft.data.batching.masking import Masking

MASK, VOCABULARY = 3, 1000


def batch(
    *sizes: int, epoch: int = 0, first_sample: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens = (np.arange(sum(sizes)) % 900 + 50).astype(np.int32)
    labels = tokens.copy()
    starts = np.cumsum(sizes) - sizes
    labels[starts] = IGNORED
    pieces = np.array([[first_sample + i, 0, size, epoch] for i, size in enumerate(sizes)])
    return tokens, labels, pieces


def masking(share: float = 0.15, seed: int = 1) -> Masking:
    return Masking(MASK, VOCABULARY, share, seed)


def test_shares_are_those_of_the_paper():
    tokens, labels, pieces = batch(*[500] * 80)
    found, wanted = masking().apply(tokens, labels, pieces)
    chosen = wanted != IGNORED
    assert abs(chosen.mean() / 0.15 - 1) < 0.05
    assert np.array_equal(wanted[chosen], tokens[chosen]) and np.array_equal(
        found[~chosen], tokens[~chosen]
    )
    assert not chosen[labels == IGNORED].any(), "special tokens are never masked"
    assert abs((found[chosen] == MASK).mean() - 0.8) < 0.02
    assert abs((found[chosen] == tokens[chosen]).mean() - 0.1) < 0.02
    assert found.dtype == np.int32 and wanted.dtype == np.int32


def test_a_sample_is_masked_alike_wherever_it_stands():
    tokens, labels, pieces = batch(30, 40, 50)
    together, _ = masking().apply(tokens, labels, pieces)
    alone, _ = masking().apply(tokens[30:70], labels[30:70], pieces[1:2])
    assert np.array_equal(together[30:70], alone)


def test_epochs_and_seeds_differ():
    found = [
        masking(seed=seed).apply(*batch(200, epoch=epoch))[0].tobytes()
        for seed in (1, 2)
        for epoch in (0, 1)
    ]
    assert len(set(found)) == 4


def test_every_sample_has_something_to_tell():
    tokens, labels, pieces = batch(*[3] * 200)
    _, wanted = masking(share=0.01).apply(tokens, labels, pieces)
    assert ((wanted != IGNORED).reshape(-1, 3).sum(1) >= 1).all()
