"""Masking: a function of seed, epoch and sample, with the shares of the BERT paper."""

from __future__ import annotations

import numpy as np

from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.batching.masking import Masking

MASK, VOCAB_SIZE = 3, 1000


def batch(
    *sizes: int, epoch: int = 0, first_sample: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens = (np.arange(sum(sizes)) % 900 + 50).astype(np.int32)
    labels = tokens.copy()
    starts = np.cumsum(sizes) - sizes
    labels[starts] = IGNORE_INDEX
    segments = np.array([[first_sample + i, 0, size, epoch] for i, size in enumerate(sizes)])
    return tokens, labels, segments


def masking(share: float = 0.15, seed: int = 1) -> Masking:
    return Masking(MASK, VOCAB_SIZE, share, seed)


def test_selected_and_masked_shares_match_the_paper():
    tokens, labels, segments = batch(*[500] * 80)
    masked, new_labels = masking().apply(tokens, labels, segments)
    selected = new_labels != IGNORE_INDEX
    assert abs(selected.mean() / 0.15 - 1) < 0.05
    assert np.array_equal(new_labels[selected], tokens[selected]) and np.array_equal(
        masked[~selected], tokens[~selected]
    )
    assert not selected[labels == IGNORE_INDEX].any(), "special tokens are never masked"
    assert abs((masked[selected] == MASK).mean() - 0.8) < 0.02
    assert abs((masked[selected] == tokens[selected]).mean() - 0.1) < 0.02
    assert masked.dtype == np.int32 and new_labels.dtype == np.int32


def test_masks_do_not_depend_on_the_batch():
    tokens, labels, segments = batch(30, 40, 50)
    together, _ = masking().apply(tokens, labels, segments)
    alone, _ = masking().apply(tokens[30:70], labels[30:70], segments[1:2])
    assert np.array_equal(together[30:70], alone)


def test_masks_differ_between_epochs_and_seeds():
    masked = [
        masking(seed=seed).apply(*batch(200, epoch=epoch))[0].tobytes()
        for seed in (1, 2)
        for epoch in (0, 1)
    ]
    assert len(set(masked)) == 4


def test_each_sample_has_a_target():
    tokens, labels, segments = batch(*[3] * 200)
    _, new_labels = masking(share=0.01).apply(tokens, labels, segments)
    assert ((new_labels != IGNORE_INDEX).reshape(-1, 3).sum(1) >= 1).all()


def test_a_segment_without_maskable_tokens_stays_as_it_is():
    tokens, labels, segments = batch(4, 6)
    labels[:4] = IGNORE_INDEX
    masked, new_labels = masking(share=0.5).apply(tokens, labels, segments)
    assert np.array_equal(masked[:4], tokens[:4])
    assert (new_labels[:4] == IGNORE_INDEX).all() and (new_labels[4:] != IGNORE_INDEX).any()
